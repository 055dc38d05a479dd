"""A server with all of its options in `--config file.yaml`: API key, reasoning parser, fp32, no async scheduling."""

import os
import re
import signal

import httpx
import openai
import pytest
import yaml

from tests.support import commands
from tests.support.server import NAME, Server

KEY = "an-api-key"
PROMPT = "Return a new list containing the names of all files in the given directory."
# The reasoning is under way already, so the tests do not depend on the model's wish to begin one.
THINKING = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "<think>\nI"},
]


@pytest.fixture(scope="module")
def configured(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configured")
    options = {
        "backend": "mindspore",
        "model": model,
        "served-model-name": NAME,
        "dtype": "float32",
        "api-key": KEY,
        "generation-config": "vllm",
        "reasoning-parser": "deepseek_r1",
        "no-async-scheduling": True,
        "max-num-batched-tokens": 64,
        "max-num-seqs": 8,
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(options))
    command = ["vllm", "serve", "--config", str(folder / "serve.yaml")]
    with Server(command, commands.free_port(), folder / "server.log", key=KEY) as running:
        yield running


def test_options_of_the_file_reach_the_engine(configured):
    log = configured.log.read_text()
    assert "vllm_mindspore" in log and "dtype=torch.float32" in log


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_api_key_nothing_is_served(configured, key):
    stranger = openai.OpenAI(base_url=configured.openai.base_url, api_key=key or "none", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model=NAME, prompt=PROMPT)
    assert httpx.get(f"{configured.http.base_url}/v1/models").status_code == 401
    assert httpx.get(f"{configured.http.base_url}/health").status_code == 200


def test_text_does_not_depend_on_chunks_of_the_prompt(configured):
    """64 tokens a step: a prompt of 300 tokens is read in 5 chunks, alone or while others decode."""
    prompt = PROMPT * 20
    texts = set()
    for salt in ("first", "second"):
        answer = configured.openai.completions.create(
            model=NAME, prompt=[prompt, prompt[:900], PROMPT], max_tokens=24, temperature=0,
            extra_body={"cache_salt": salt, "ignore_eos": True},
        )  # fmt: skip
        texts.add(tuple(choice.text for choice in answer.choices))
    alone = [
        configured.openai.completions.create(
            model=NAME, prompt=p, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        ).choices[0].text
        for p in (prompt, prompt[:900], PROMPT)
    ]  # fmt: skip
    assert texts == {tuple(alone)}


def think(configured, stream: bool = False, **options):
    body = {"add_generation_prompt": False, "continue_final_message": True, "ignore_eos": True, **options}
    return configured.openai.chat.completions.create(
        model=NAME, messages=THINKING, max_tokens=40, temperature=0, stream=stream, extra_body=body
    )


def test_reasoning_is_split_from_the_answer(configured):
    """A budget ends the reasoning after 8 tokens, whatever the model would do; the rest is content."""
    message = think(configured, thinking_token_budget=8).choices[0].message
    assert message.reasoning and message.content
    assert "</think>" not in message.reasoning + message.content
    reasoning = content = ""
    for chunk in think(configured, stream=True, thinking_token_budget=8):
        reasoning += getattr(chunk.choices[0].delta, "reasoning", None) or ""
        content += chunk.choices[0].delta.content or ""
    assert (reasoning, content) == (message.reasoning, message.content)


def test_structured_output_begins_after_the_reasoning(configured):
    pattern = "[A-Z]{3,6} [0-9]{2}"
    answer = think(configured, thinking_token_budget=8, structured_outputs={"regex": pattern})
    message = answer.choices[0].message
    assert re.match(pattern, message.content) and not re.match(pattern, message.reasoning.strip())


def test_sigterm_ends_the_server_cleanly(configured):
    """Keep this test last in the module: it stops the module's server."""
    processes, shared = configured.processes(), commands.shared_memory(configured.processes())
    assert configured.stop(signal.SIGTERM) == 0
    commands.wait_ended(processes)
    assert not any(map(os.path.exists, shared))
