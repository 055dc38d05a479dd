"""Where to get a CPU build of PyTorch: prints pip's arguments for it. Run with the environment's interpreter.

    python deploy/find_torch.py 2.13.0

The configured index (or a wheel in a configured directory) is asked first, for its metadata only; it is taken when
what it offers depends on no CUDA package. Otherwise it is PyTorch's own CPU index, or $TORCH_INDEX_URL.
"""

import json
import os
import re
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PACKAGES = re.compile(r"(nvidia|cuda)[-_.]", re.IGNORECASE)
SECONDS_TO_ANSWER = 120


def offered(requirement: str) -> dict | None:
    """Metadata of the wheel that pip would install for `requirement`, None when there is none. Downloads no wheel."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    command += ["--only-binary", "torch", "--use-feature", "fast-deps", "--report", "-", requirement]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=True)
        return json.loads(answer.stdout)["install"][0]["metadata"]
    except (subprocess.SubprocessError, ValueError, LookupError) as error:
        print(f"{requirement}: no answer from the configured index ({type(error).__name__})", file=sys.stderr)
        return None


def needs_cuda(wheel: dict) -> bool:
    """Whether a wheel's requirements, extras aside, name a CUDA package."""
    requirements = wheel.get("requires_dist", [])
    return any(CUDA_PACKAGES.match(line) for line in requirements if "extra ==" not in line)


def pip_arguments(version: str) -> list[str]:
    """Arguments for `pip install` that give a CPU build of `version`."""
    if index := os.environ.get("TORCH_INDEX_URL"):
        return [f"torch=={version}", "--index-url", index]
    if offered(f"torch=={version}+cpu"):
        return [f"torch=={version}+cpu"]
    wheel = offered(f"torch=={version}")
    if wheel is not None and not needs_cuda(wheel):
        return [f"torch=={version}"]
    return [f"torch=={version}", "--index-url", CPU_INDEX]


if __name__ == "__main__":
    print("\n".join(pip_arguments(sys.argv[1])))
