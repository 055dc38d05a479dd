"""Two network namespaces that stand for two hosts, with a cable between them."""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass

from tests.support.commands import BIN

INTERFACE = "veth0"
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A namespace and the address by which the other one reaches it."""

    name: str
    address: str

    @property
    def environment(self) -> dict[str, str]:
        """For vLLM's processes on it: which address and interface are to be used."""
        return {"VLLM_HOST_IP": self.address, "GLOO_SOCKET_IFNAME": INTERFACE}

    def runs(self, command: list[str]) -> list[str]:
        """A command of this environment, run on it."""
        return [shutil.which("ip"), "netns", "exec", self.name, str(BIN / command[0]), *command[1:]]


class TwoHosts:
    """Leaving the `with` block removes them.

    door: the address by which this process reaches the first one.
    """

    def __init__(self) -> None:
        self._interface = f"vms{os.getpid()}"
        network = f"10.{128 + os.getpid() % 128}.{os.getpid() // 128 % 256}"
        self.outside, self.door = f"{network}.1", f"{network}.2"
        self.hosts = [Host(f"vllm-ms-{os.getpid()}-{i}", f"10.77.0.{i + 1}") for i in range(2)]

    def __enter__(self) -> "TwoHosts":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        for host in self.hosts:
            _ip("netns", "add", host.name)
        first, second = self.hosts
        _ip("link", "add", INTERFACE, "netns", first.name, "type", "veth", "peer", "name", INTERFACE,
            "netns", second.name)  # fmt: skip
        door = self._interface
        _ip("link", "add", door, "type", "veth", "peer", "name", "door", "netns", first.name)
        _ip("address", "add", f"{self.outside}/30", "dev", door)
        _ip("link", "set", door, "up")
        _ip("-n", first.name, "address", "add", f"{self.door}/30", "dev", "door")
        _ip("-n", first.name, "link", "set", "door", "up")
        for host in self.hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.name, "link", "set", "lo", "up")
        self.connect()

    def __exit__(self, *exception) -> None:
        # A namespace goes some time after it is deleted, and takes its interfaces along only then.
        subprocess.run(["ip", "link", "delete", self._interface], capture_output=True)
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)

    def connect(self) -> None:
        for host in self.hosts:
            _ip("-n", host.name, "link", "set", INTERFACE, "up")

    def cut(self) -> None:
        """Pull the cable out: nothing is told to either side."""
        _ip("-n", self.hosts[1].name, "link", "set", INTERFACE, "down")


def missing() -> str:
    """Why there can be no namespaces here; empty if there can be."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"vllm-ms-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return "" if tried.returncode == 0 else f"network namespaces are not permitted: {tried.stderr.strip()}"


def enter(host: Host) -> None:
    """Move this thread, and those that it starts, to a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host.name}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {host.name}")
    os.environ.update(host.environment)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr}")
