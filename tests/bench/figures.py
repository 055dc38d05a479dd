"""How the figures of docs/figures are written."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")


def save(figure, axes, file: Path) -> None:
    """Write a figure of one pair of axes as SVG, the same bytes for the same points."""
    matplotlib.rcParams["svg.hashsalt"] = file.stem
    axes.grid(alpha=0.3)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
