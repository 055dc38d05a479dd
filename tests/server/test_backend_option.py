"""`--backend`, `backend:` in a YAML file, VLLM_MS_BACKEND: an unknown one is one clear error before anything loads."""

import signal
import time

import pytest
import yaml

from tests.support import commands
from tests.support.server import NAME


@pytest.mark.parametrize("source", ["flag", "file", "environment"])
def test_unknown_backend_is_refused_before_anything_loads(model, tmp_path, source):
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"backend": "tensorrt", "model": model}))
    command, env = {
        "flag": (["vllm", "serve", model, "--backend", "tensorrt"], {}),
        "file": (["vllm", "serve", "--config", str(file)], {}),
        "environment": (["vllm", "serve", model], {"VLLM_MS_BACKEND": "tensorrt"}),
    }[source]
    begin = time.monotonic()
    result = commands.run(command, env)
    seconds = time.monotonic() - begin
    assert result.returncode not in (0, None)
    complaints = [line for line in (result.stdout + result.stderr).splitlines() if "tensorrt" in line]
    assert len(complaints) == 1, result.stderr
    assert "unknown backend 'tensorrt'" in complaints[0] and "Supported: mindspore" in complaints[0]
    assert {"flag": "--backend", "file": "--backend", "environment": "VLLM_MS_BACKEND"}[source] in complaints[0]
    assert "Traceback" not in result.stderr and "EngineCore" not in result.stdout + result.stderr
    assert seconds < 60, "most of it is the import of vLLM, on a busy machine"


def test_backend_of_the_environment_serves_and_ends_on_sigint(start_server, model):
    server = start_server(
        ["vllm", "serve", model, "--served-model-name", NAME, "--max-model-len", "512"],
        env={"VLLM_MS_BACKEND": "MindSpore"},
    )
    answer = server.openai.completions.create(model=NAME, prompt="Return a", max_tokens=5)
    assert answer.usage.completion_tokens <= 5
    assert "MindSpore" in server.log.read_text()
    processes = server.processes()
    assert server.stop(signal.SIGINT) == 0
    commands.wait_ended(processes)
