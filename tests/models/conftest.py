"""Writes the README's support table from the results of the parity tests.

`make support-table` runs them with VLLM_MS_SUPPORT_TABLE naming the file whose table, between its two markers, is
replaced. Nothing is written when a family was not tested in both types, so that the table never shows a partial run.
"""

import os
import re
from pathlib import Path

from .families import FAMILIES

BEGIN, END = "<!-- support-table:begin -->", "<!-- support-table:end -->"
TESTS = {
    "test_float32_tokens_and_logits_equal_the_reference": "float32",
    "test_bfloat16_divergence_is_not_above_hugging_faces_own": "bfloat16",
}
WORDS = {"passed": "yes", "failed": "**no**", None: "not tested"}
_results: dict[tuple[str, str], str] = {}


def pytest_runtest_logreport(report) -> None:
    """Collect each family's result; an error in setup or teardown counts as a failure."""
    match = re.search(r"test_parity\.py::(\w+)\[([\w.-]+)\]", report.nodeid)
    if match and match[1] in TESTS and (report.when == "call" or report.failed):
        key = (match[2], TESTS[match[1]])
        _results[key] = "failed" if report.failed or _results.get(key) == "failed" else report.outcome


def support_table(results: dict[tuple[str, str], str]) -> str:
    """The table in Markdown: one row for each family."""
    rows = [
        "| family | class | compared with | float32: tokens and logits equal | bfloat16: KL not above Hugging Face's |",
        "|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        cells = [WORDS[results.get((name, dtype))] for dtype in ("float32", "bfloat16")]
        rows.append(f"| {name} | `{family.vllm_class}` | {family.reference} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def pytest_sessionfinish(session) -> None:
    target = os.environ.get("VLLM_MS_SUPPORT_TABLE")
    if not target or {name for name, _ in _results} != set(FAMILIES) or len(_results) != 2 * len(FAMILIES):
        return
    path = Path(target)
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{support_table(_results)}\n{END}{after}")
