"""What the documentation states is true of the code beside it."""

import re
from pathlib import Path

import pytest

from vllm_mindspore import options, patches
from vllm_mindspore.cli import SUBCOMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_readme_states_the_number_of_patches():
    assert f"replaces: **{len(patches.PATCHES)}**" in (ROOT / "README.md").read_text()


def test_every_environment_variable_is_documented_and_no_other():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert set(re.findall(r"`(VLLM_MS_\w+)`", text)) == set(options.ENVIRONMENT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_shown_exist(document):
    text = document.read_text()
    commands = set(re.findall(r"vllm-mindspore (\w[\w-]*)", text)) - {"is", "can", "cannot", "into", "and"}
    assert commands <= set(SUBCOMMANDS)
    targets = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
