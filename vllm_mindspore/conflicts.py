"""What `pip check` would say about the packages that serving depends on, and which of it is known to be harmless."""

from dataclasses import dataclass
from importlib import metadata

ROOTS = ("vllm-mindspore", "vllm", "torch", "mindspore")

# (distribution, requirement) -> why it may stay; deploy/constraints*.txt tell the same.
KNOWN = {
    ("opencv-python-headless", "numpy"): (
        "vLLM wants opencv-python-headless>=4.13, which declares numpy>=2 but runs with NumPy 1.26; MindSpore needs 1.x"
    ),
    ("vllm", "certifi"): (
        "vLLM 0.33 wants a newer list of certificate authorities than the package index had; only HTTPS depends on it"
    ),
}


@dataclass(frozen=True)
class Conflict:
    """A requirement that is not met. `found`: None when it is not installed. `reason`: why it may stay, or None."""

    distribution: str
    version: str
    requirement: str
    found: str | None
    reason: str | None

    def __str__(self) -> str:
        found = f"{self.found} is installed" if self.found else "it is not installed"
        text = f"{self.distribution} {self.version} requires {self.requirement}, but {found}"
        return f"{text} (known: {self.reason})" if self.reason else text


def find_conflicts() -> list[Conflict]:
    """Unmet requirements of `ROOTS` and of everything they need, in the order they are reached."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    conflicts = []
    waiting = [(root, frozenset()) for root in ROOTS]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop(0)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if not _applies(requirement, extras):
                continue
            needed = canonicalize_name(requirement.name)
            found = _version(needed)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                reason = KNOWN.get((canonicalize_name(name), needed))
                wanted = f"{requirement.name}{requirement.specifier}"
                conflicts.append(Conflict(name, distribution.version, wanted, found, reason))
            item = (needed, frozenset(requirement.extras))
            if item not in seen:
                seen.add(item)
                waiting.append(item)
    return conflicts


def _applies(requirement, extras: frozenset) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
