"""The `vllm-mindspore` command: every registered subcommand is reachable, and mistakes are told without a traceback."""

import pytest

from vllm_mindspore import cli


def test_help_lists_every_subcommand(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in cli.SUBCOMMANDS:
        assert f"    {name} " in text


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vllm-mindspore {name}")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["env", "--nonsense"]])
def test_wrong_command_line_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: vllm-mindspore" in capsys.readouterr().err


def test_only_the_chosen_subcommand_is_imported(monkeypatch):
    monkeypatch.setitem(cli.SUBCOMMANDS, "broken", ("vllm_mindspore.cli.does_not_exist", "cannot be imported"))
    assert cli.main(["env", "--json", "--no-imports"]) == 0
