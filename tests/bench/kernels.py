"""The kernels beside the machine: `make bench-kernels`, or one family with `make bench-kernels ARGS=attention`.

`VLLM_MS_CPU_ISA=avx2 make bench-kernels` measures another variant than the best one. `ARGS='--figure file.svg'` draws a
roofline of what is printed: each kernel's GFLOP/s against its operations per byte, under the machine's peaks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figures import save
from tests.bench.native import built

FAMILIES = ("linear", "experts", "quantized", "attention", "latents", "sparse", "rows")
PEAKS = re.compile(r"peaks: read ([\d.]+) GB/s, .*?([\d.]+) GFLOP/s")
KERNEL = re.compile(r"(?P<name>.+?) +[\d.]+ us +(?P<bytes>[\d.]+) GB/s +(?P<operations>[\d.]+) GFLOP/s")


@dataclass(frozen=True)
class Kernel:
    """What a kernel reached: 1e9 bytes and operations a second."""

    name: str
    bytes: float
    operations: float


def draw(lines: list[str], file: Path) -> None:
    """A roofline of the lines that the program printed."""
    from matplotlib import pyplot

    bandwidth, products = map(float, next(filter(None, map(PEAKS.search, lines))).groups())
    kernels = [
        Kernel(found["name"], float(found["bytes"]), float(found["operations"]))
        for found in map(KERNEL.match, lines)
        if found and float(found["operations"])
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    intensities = [kernel.operations / kernel.bytes for kernel in kernels]
    ridge = products / bandwidth
    roof = [min(intensities) / 1.5, ridge, max(max(intensities), ridge) * 1.5]
    axes.plot(roof, [min(x * bandwidth, products) for x in roof], color="black", linewidth=1)
    axes.annotate(f"{bandwidth:.0f} GB/s read", (roof[0], roof[0] * bandwidth), rotation=0, va="bottom", fontsize=8)
    axes.annotate(f"{products:.0f} GFLOP/s", (ridge, products), va="bottom", fontsize=8)
    for kind in dict.fromkeys(re.split(r"[ ,]", kernel.name)[0] for kernel in kernels):
        points = [(k.operations / k.bytes, k.operations) for k in kernels if re.split(r"[ ,]", k.name)[0] == kind]
        axes.scatter(*zip(*points, strict=True), s=14, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("operations per byte of weights or cache")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8, loc="lower right")
    save(figure, axes, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", choices=FAMILIES)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    command = [str(built("kernels.cc")), *([options.family] if options.family else [])]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if options.figure and process.returncode == 0:
        draw(lines, options.figure)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
