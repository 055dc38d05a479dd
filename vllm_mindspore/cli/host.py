"""Facts about the machine, read from the system's own files; each is None or empty where the system does not tell."""

import os
import platform
from pathlib import Path

# Instruction sets that the operators, MindSpore or oneDNN choose by.
CPU_FEATURES = (
    "sse4_2 avx f16c fma avx2 avx_vnni avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_vnni avx512_bf16 "
    "avx512_fp16 amx_tile amx_bf16 amx_int8 asimd asimdhp asimddp bf16 i8mm sve sve2"
).split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _fields(text: str) -> dict[str, str]:
    """`name: value` lines; the first of each name counts."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def operating_system() -> str:
    """Distribution, kernel, machine and C library: `Debian GNU/Linux 12 (bookworm), Linux 6.1 x86_64, glibc 2.36`."""
    release = dict(line.split("=", 1) for line in _read("/etc/os-release").splitlines() if "=" in line)
    name = release.get("PRETTY_NAME", "").strip('"') or platform.system()
    c_library = " ".join(platform.libc_ver()).strip() or "unknown C library"
    return f"{name}, {platform.system()} {platform.release()} {platform.machine()}, {c_library}"


def cpu() -> dict:
    """Model, features, number of CPUs, those this process may use, and the control group's limit in CPUs."""
    fields = _fields(_read("/proc/cpuinfo"))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or fields.get("CPU part") or platform.processor() or None,
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "cpus": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)),
        "cgroup_cpus": _cgroup_cpus(),
    }


def _cgroup_cpus() -> float | None:
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return int(quota) / int(period)
    return None


def memory() -> dict:
    """Bytes: total, available, the control group's limit; and free space of shared memory."""
    fields = _fields(_read("/proc/meminfo"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "total": _kib(fields.get("MemTotal")),
        "available": _kib(fields.get("MemAvailable")),
        "cgroup_limit": int(limit) if limit.isdigit() else None,
        "shared_memory_free": _free("/dev/shm"),
    }


def _kib(text: str | None) -> int | None:
    words = (text or "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else None


def _free(path: str) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def ascend_devices() -> list[str]:
    """Ascend device nodes of this machine."""
    return sorted(str(path) for path in Path("/dev").glob("davinci[0-9]*"))
