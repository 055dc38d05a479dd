"""`vllm-mindspore ops`: what is mapped, and on which device it runs."""

import argparse
import json

DEVICES = ("cpu", "ascend")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print PyTorch operators with a meaning in MindSpore, and the operators of our library with their devices."""
    from vllm_mindspore.compiler import legalize
    from vllm_mindspore.compiler.torch_map import TABLE
    from vllm_mindspore.ops import registry

    registry.define_all()
    rewritten = sorted({legalize.operator_name(target) for target in legalize.RULES})
    own = {name: _devices(operator) for name, operator in sorted(registry.OPERATORS.items())}
    mapped = {name: "MindSpore functions" for name in sorted(TABLE)} | dict.fromkeys(
        rewritten, "operators of the library"
    )
    if args.json:
        print(json.dumps({"torch": mapped, "library": own}, indent=1))
        return 0
    print(f"PyTorch operators with a meaning in MindSpore ({len(mapped)}; any device):")
    for name, meaning in sorted(mapped.items()):
        print(f"  {name:42} {meaning}")
    print(f"\nOperators of the library ({len(own)}):")
    for name, devices in own.items():
        print(f"  {name:42} {', '.join(devices)}")
    return 0


def _devices(operator) -> list[str]:
    return [device for device in DEVICES if getattr(operator, device) is not None]
