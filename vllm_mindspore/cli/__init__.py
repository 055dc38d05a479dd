"""The `vllm-mindspore` command: one file per subcommand, and one line of `SUBCOMMANDS` that names it.

A subcommand's module has `add_arguments(parser)` and `run(args) -> int` (the exit code). It is imported only when it
is the one asked for, so that a broken installation can still be inspected with `vllm-mindspore env`.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from vllm_mindspore.version import __version__

# name -> (module, one line for --help)
SUBCOMMANDS = {
    "env": ("vllm_mindspore.cli.env", "print versions, device, kernels and problems: the text for a bug report"),
    "inspect": ("vllm_mindspore.cli.inspect", "print a model's graph around each pass, and the path of its network"),
    "ops": ("vllm_mindspore.cli.ops", "print the PyTorch operators that are mapped, and the operators of the library"),
}


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-mindspore", description="Tools of vLLM on MindSpore.")
    parser.add_argument("--version", action="version", version=f"vllm-mindspore {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            command = importlib.import_module(module)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; `argv` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 0
    except KeyboardInterrupt:
        return 130
