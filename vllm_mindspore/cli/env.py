"""`vllm-mindspore env`: what is installed here and what is wrong with it, as text for a bug report.

People run it when something is broken, so no part may stop another: whatever could crash or hang (the native libraries
of PyTorch, MindSpore, vLLM and our operators) is tried in a process of its own, and its last words are reported.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vllm_mindspore import compat
from vllm_mindspore.cli import host
from vllm_mindspore.version import __version__

PACKAGES = "vllm torch mindspore numpy transformers tokenizers safetensors numba triton pip".split()
PROBES = {
    "torch": "import json, torch; print(json.dumps({'version': torch.__version__}))",
    "mindspore": "import json, mindspore; print(json.dumps({'version': mindspore.__version__}))",
    "vllm": "import json, vllm; print(json.dumps({'version': vllm.__version__}))",
}
KERNELS = "import json; from vllm_mindspore.ops import build; print(json.dumps(build.kernel_info()))"
PROBE_SECONDS = 180


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit with code 1 when a problem is found")
    parser.add_argument("--no-imports", action="store_true", help="do not try to import PyTorch, MindSpore and vLLM")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0, or with --check 1 when it has problems."""
    report = collect(imports=not args.no_imports)
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if args.check and report["problems"] else 0


def collect(imports: bool = True) -> dict:
    """The report, JSON-serializable. A part that fails is {"error": message} and adds to report["problems"]."""
    parts: dict[str, Callable[[], object]] = {
        "versions": _versions,
        "system": _system,
        "device": _device,
        "cpu": host.cpu,
        "memory": host.memory,
        "kernels": lambda: _probe(KERNELS),
        "cache": _cache,
        "patches": _patches,
        "settings": _settings,
        "imports": _imports if imports else dict,
        "conflicts": _conflicts,
    }
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(_guarded, part) for name, part in parts.items()}
        report = {name: future.result() for name, future in futures.items()}
    report["problems"] = _problems(report)
    return report


def _guarded(part: Callable[[], object]) -> object:
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> dict:
    versions = {"python": sys.version.split()[0], "vllm-mindspore": __version__}
    return versions | {name: compat.installed_version(name) for name in PACKAGES}


def _system() -> dict:
    return {
        "os": host.operating_system(),
        "python": f"{platform.python_implementation()} at {sys.executable}",
        "package": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    }


def _device() -> dict:
    return {"in_use": "cpu", "ascend_devices": host.ascend_devices()}


def _cache() -> dict:
    return importlib.import_module("vllm_mindspore.compiler.cache").cache_info()


def _patches() -> list[str]:
    return [patch.attribute for patch in importlib.import_module("vllm_mindspore.patches").PATCHES]


def _settings() -> dict[str, str]:
    """Environment variables that are set and change how this backend runs."""
    ours = importlib.import_module("vllm_mindspore.options").ENVIRONMENT
    others = ("OMP_NUM_THREADS", "VLLM_PLUGINS", "VLLM_TARGET_DEVICE", "LD_PRELOAD", "PYTHONPATH")
    return {name: os.environ[name] for name in (*ours, *others) if name in os.environ}


def _conflicts() -> list[dict]:
    from vllm_mindspore.conflicts import find_conflicts

    return [{"text": str(conflict), "known": conflict.reason is not None} for conflict in find_conflicts()]


def _imports() -> dict:
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(_guarded, lambda code=code: _probe(code)) for name, code in PROBES.items()}
        return {name: future.result() for name, future in futures.items()}


def _probe(code: str) -> dict:
    """Run `code` in a new process and parse the JSON of its last line; {"error": its last words} when it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS} s"}
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode > 0:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"error": words[-1] if words else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _problems(report: dict) -> list[str]:
    problems = _guarded(compat.check_environment)
    if isinstance(problems, dict):
        problems = [f"versions could not be checked: {problems['error']}"]
    for name, part in report.items():
        if isinstance(part, dict) and part.get("error"):
            problems.append(f"{name}: {part['error']}")
    kernels = report["kernels"]
    if kernels.get("problem"):
        problems.append(f"kernels: {kernels['problem']}")
    imports = [(name, found) for name, found in report["imports"].items() if isinstance(found, dict)]
    problems += [f"import {name}: {found['error']}" for name, found in imports if "error" in found]
    if isinstance(report["conflicts"], list):
        problems += [conflict["text"] for conflict in report["conflicts"] if not conflict["known"]]
    return problems


def render(report: dict) -> str:
    """The report as text, one fact a line."""
    lines = []
    for name, part in report.items():
        if name in ("problems", "imports", "conflicts"):
            continue
        lines.append(f"{name}:")
        lines += [f"  {line}" for line in _render_part(name, part)]
    known = [conflict["text"] for conflict in report["conflicts"] if isinstance(conflict, dict) and conflict["known"]]
    lines += ["known and harmless:", *(f"  {text}" for text in known or ["nothing"])]
    lines += ["problems:", *(f"  {text}" for text in report["problems"] or ["none found"])]
    return "\n".join(lines)


def _render_part(name: str, part: object) -> list[str]:
    if isinstance(part, list):
        return [f"{len(part)} attributes replaced", *part] if name == "patches" else [str(item) for item in part]
    if not part:
        return ["none"]
    return [f"{key}: {_render_value(name, key, value)}" for key, value in part.items()]


def _render_value(part: str, key: str, value: object) -> str:
    if value is None:
        return "not installed" if part == "versions" else "unknown" if part != "kernels" else "none"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool) and (part == "memory" or "bytes" in key or key == "size"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
