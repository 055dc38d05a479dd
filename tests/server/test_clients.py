"""vLLM's own commands against our server, and those that run the model themselves."""

import json
import re

import pytest

from tests.support import commands
from tests.support.server import NAME


def test_vllm_chat_answers_a_quick_question(server):
    result = commands.run(["vllm", "chat", "--url", f"{server.http.base_url}/v1", "-q", "What does os.listdir return?"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_vllm_complete_continues_a_prompt(server, complete):
    url = f"{server.http.base_url}/v1"
    result = commands.run(["vllm", "complete", "--url", url, "--max-tokens", "8", "-q", "Return a new list"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_vllm_bench_serve_measures_the_server(server, model, tmp_path):
    command = [
        "vllm", "bench", "serve", "--base-url", str(server.http.base_url).rstrip("/"), "--model", NAME,
        "--tokenizer", model, "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16",
        "--num-prompts", "24", "--max-concurrency", "8", "--ignore-eos", "--save-result",
        "--result-dir", str(tmp_path), "--result-filename", "result.json",
    ]  # fmt: skip
    result = commands.run(command)
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "result.json").read_text())
    assert measured["completed"] == 24 and measured["total_output_tokens"] == 24 * 16
    assert measured["output_throughput"] > 0 and measured["mean_ttft_ms"] > 0


def test_vllm_run_batch_answers_every_line(model, tmp_path):
    lines = [
        {"custom_id": str(i), "method": "POST", "url": url, "body": {"model": model, "max_tokens": 4 + i, **body}}
        for i, (url, body) in enumerate(
            [
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What is a list?"}]}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "And a set?"}], "temperature": 0}),
                ("/v1/chat/completions", {"messages": []}),
            ]
        )
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["vllm", "run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"),
               "--model", model, "--backend", "mindspore", "--max-model-len", "512"]  # fmt: skip
    result = commands.run(command)
    assert result.returncode == 0, result.stderr
    assert "MindSpore" in result.stdout + result.stderr
    answers = {a["custom_id"]: a for a in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert answers.keys() == {"0", "1", "2"}
    assert all(answers[i]["response"]["body"]["choices"][0]["message"]["content"] for i in "01")
    assert answers["2"]["response"]["status_code"] == 400 or answers["2"]["error"]


@pytest.mark.slow
def test_vllm_bench_throughput_and_latency_run_the_model(model, wide_vocabulary):
    throughput = commands.run(
        ["vllm", "bench", "throughput", "--model", model, "--dataset-name", "random", "--random-input-len", "16",
         "--random-output-len", "8", "--num-prompts", "8"],
        env={"VLLM_MS_BACKEND": "mindspore"},
    )  # fmt: skip
    assert throughput.returncode == 0, throughput.stderr
    assert float(re.search(r"Throughput: ([\d.]+) requests/s", throughput.stdout)[1]) > 0
    latency = commands.run(
        ["vllm", "bench", "latency", "--model", str(wide_vocabulary), "--load-format", "dummy", "--input-len", "8",
         "--output-len", "8", "--batch-size", "2", "--num-iters", "2", "--num-iters-warmup", "1"]
    )  # fmt: skip
    assert latency.returncode == 0, latency.stderr
    assert float(re.search(r"Avg latency: ([\d.]+) seconds", latency.stdout)[1]) > 0
