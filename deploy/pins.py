"""Compare an environment with deploy/constraints.txt; run with that environment's interpreter, standard library only.

    python deploy/pins.py list SECTION...      the pins of these sections
    python deploy/pins.py missing SECTION...   those that are not installed in that version, or only half installed
    python deploy/pins.py status SECTION...    one line each: section, digest of its pins, their number, number missing,
                                               version of the first

A section starts at a line `# [name]` of constraints.txt. With VLLM=0.33.0 in the environment the pins of
deploy/constraints-vllm-0.33.0.txt replace those of the same packages. A distribution whose installation was interrupted
is removed from the environment's records, so that pip installs it again instead of believing its version.
"""

import hashlib
import os
import platform
import re
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
SECTION = re.compile(r"#\s*\[(\w+)\]")
PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)\s*(;\s*platform_machine == '(?P<machine>\w+)')?")


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pin_files() -> list[Path]:
    """constraints.txt, and what changes in it for the version of vLLM that $VLLM names."""
    version = os.environ.get("VLLM")
    return [CONSTRAINTS, CONSTRAINTS.with_name(f"constraints-vllm-{version}.txt")] if version else [CONSTRAINTS]


def read_pins(*paths: Path) -> dict[str, dict[str, str]]:
    """{section: {normalized name: version}} for this machine, in the files' order; later files win.

    Raises:
        ValueError: a line is neither a comment nor an exact pin.
    """
    sections: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    lines = [(path, *item) for path in paths or pin_files() for item in enumerate(path.read_text().splitlines(), 1)]
    for path, number, line in lines:
        if heading := SECTION.match(line):
            current = sections.setdefault(heading[1], {})
        text = line.split("#")[0].strip()
        if not text:
            continue
        pin = PIN.fullmatch(text)
        if pin is None:
            raise ValueError(f"{path.name}:{number}: not an exact pin: {text}")
        if pin["machine"] in (None, platform.machine()):
            current[normalized(pin["name"])] = pin["version"]
    return sections


def is_complete(distribution: metadata.Distribution) -> bool:
    """Whether pip finished installing it: pip writes INSTALLER, then RECORD, after all other files."""
    record = distribution.read_text("RECORD") or ""
    return distribution.read_text("INSTALLER") is not None and ".dist-info/INSTALLER" in record


def installed(site: Path) -> dict[str, str]:
    """{normalized name: version without its local part} in `site`; drops the records of interrupted installations."""
    for leftover in site.glob("~*"):  # what pip set aside when it was killed during an upgrade
        shutil.rmtree(leftover, ignore_errors=True)
    found = {}
    for directory in site.glob("*.dist-info"):
        distribution = metadata.Distribution.at(directory)
        if distribution.metadata is None or distribution.metadata["Name"] is None or not is_complete(distribution):
            shutil.rmtree(directory)
            continue
        found[normalized(distribution.metadata["Name"])] = distribution.version.split("+")[0]
    return found


def main(arguments: list[str]) -> int:
    """Print the answer and return 0; 2 for a wrong command line."""
    sections = read_pins()
    command, names = (arguments or [""])[0], arguments[1:]
    if command not in ("list", "missing", "status") or not names or not set(names) <= set(sections):
        print(f"usage: pins.py list|missing|status SECTION...   (sections: {', '.join(sections)})", file=sys.stderr)
        return 2
    have = {} if command == "list" else installed(Path(sysconfig.get_path("purelib")))
    for section in names:
        pins = sections[section]
        missing = {name: version for name, version in pins.items() if have.get(name) != version}
        if command == "status":
            digest = hashlib.sha256(repr(list(pins.items())).encode()).hexdigest()[:16]
            print(section, digest, len(pins), len(missing), next(iter(pins.values())))
        else:
            print("".join(f"{name}=={version}\n" for name, version in missing.items()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
