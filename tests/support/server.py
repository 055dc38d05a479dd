"""A real `vllm serve … --backend mindspore`, with real clients."""

import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil
from openai import OpenAI

from tests.support import commands

START_TIMEOUT = 300
STOP_TIMEOUT = 60
NAME = "served"


class Server:
    """One running server; `stop()` (or leaving the `with` block) ends it and whatever it started."""

    def __init__(
        self,
        command: list[str],
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        key: str = "",
        address: str = "127.0.0.1",
    ):
        """command: `vllm serve …` without host and port. log: receives stdout and stderr. key: the API key, if any.
        address: where it listens."""
        self.port, self.log, self.key = port, log, key
        self.directory = commands.short_temporary_directory()
        self._log_file = open(log, "ab")
        self.process = commands.start(
            [*command, "--host", address, "--port", str(port)],
            {"TMPDIR": self.directory, **(env or {})},
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=f"http://{address}:{port}", headers=headers, timeout=120)
        self.openai = OpenAI(base_url=f"http://{address}:{port}/v1", api_key=key or "none", max_retries=0, timeout=120)

    def wait_ready(self, timeout: float = START_TIMEOUT) -> "Server":
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the server exited with {self.process.returncode}:\n{self.log_tail()}")
            try:
                return self.http.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        try:
            commands.wait_until(ready, timeout, f"/health answers 200; see {self.log}", interval=0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def __enter__(self) -> "Server":
        return self.wait_ready()

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End the server and return its exit code; kills what does not end by itself. May be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            commands.kill_group(self.process)
            self.process.wait()
            self.http.close()
            self.openai.close()
            self._log_file.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def processes(self) -> list[psutil.Process]:
        """The API server first, then everything it has started."""
        api = psutil.Process(self.process.pid)
        return [api, *api.children(recursive=True)]

    def process_named(self, name: str) -> psutil.Process:
        """The process whose title has `name`: EngineCore or Worker."""
        return next(process for process in self.processes() if name in " ".join(process.cmdline()))

    def metric(self, name: str) -> float:
        """Sum over the labels of the metric `vllm:{name}`."""
        text = self.http.get("/metrics").text
        values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        if not values:
            raise KeyError(f"no metric vllm:{name}")
        return sum(map(float, values))

    def tokens(self, text: str) -> list[int]:
        """Token ids of `text` without special tokens added."""
        answer = self.http.post("/tokenize", json={"model": NAME, "prompt": text, "add_special_tokens": False})
        return answer.json()["tokens"]

    def text(self, tokens: list[int]) -> str:
        return self.http.post("/detokenize", json={"model": NAME, "tokens": tokens}).json()["prompt"]
