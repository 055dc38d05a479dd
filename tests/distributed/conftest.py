"""Writes the table of models and layouts in docs/parallelism.md from the results of the tests that compare tokens.

A test says with `layout` what it runs. `make layout-table` runs all of them with VLLM_MS_LAYOUT_TABLE naming the file;
between its two markers the cells that were tested are replaced, the others stay.
"""

import os
from pathlib import Path

import pytest

from tests.models.parallel_families import PARALLEL_FAMILIES

BEGIN, END = "<!-- layout-table:begin -->", "<!-- layout-table:end -->"
WORDS = {"passed": "yes", "failed": "**no**"}
_results: dict[tuple[str, str], str] = {}


@pytest.fixture
def layout(record_property):
    """layout(family, layout): what the test runs, for the table."""
    return lambda name, what: record_property("layout", f"{name}|{what}")


def pytest_runtest_logreport(report) -> None:
    for key, value in report.user_properties:
        if key == "layout" and (report.when == "call" or report.failed):
            name, what = value.split("|")
            name = name.removeprefix("parallel-")
            _results[what, name] = "failed" if report.failed else report.outcome


def merged(table: str, results: dict[tuple[str, str], str]) -> str:
    """The table in Markdown, a row for each layout and a column for each family, with these results put in."""
    lines = table.splitlines() or ["| |", "|-|"]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    cells = {(row[0], name): cell for row in rows for name, cell in zip(header[1:], row[1:], strict=True) if cell}
    cells |= {key: WORDS[outcome] for key, outcome in results.items() if outcome in WORDS}
    families = [name.removeprefix("parallel-") for name in PARALLEL_FAMILIES]
    layouts = sorted({what for what, _ in cells}, key=lambda what: (what.split()[0] == "DP", len(what), what))
    lines = [["layout", *families], ["---"] * (len(families) + 1)]
    lines += [[what, *(cells.get((what, name), "") for name in families)] for what in layouts]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pytest_sessionfinish(session) -> None:
    target = os.environ.get("VLLM_MS_LAYOUT_TABLE")
    if not target or not _results or hasattr(session.config, "workerinput"):
        return
    path = Path(target)
    before, rest = path.read_text().split(BEGIN)
    table, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{merged(table.strip(), _results)}\n{END}{after}")
