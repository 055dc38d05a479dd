"""One server for most modules of this folder; others start their own through `start_server`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support import checkpoints, commands
from tests.support.server import NAME, Server
from vllm_mindspore.demo import model_path

# vLLM's neutral sampling defaults instead of the checkpoint's, a tool parser, and cached tokens in `usage`.
OPTIONS = (
    "--generation-config", "vllm", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    "--max-num-seqs", "32", "--enable-prompt-tokens-details",
)  # fmt: skip


@pytest.fixture(scope="package")
def model() -> str:
    """The demo model: small, with a tokenizer, a chat template and 2,048 tokens of context."""
    return str(model_path())


@pytest.fixture(scope="package")
def serve_command(model: str) -> list[str]:
    return ["vllm", "serve", model, "--backend", "mindspore", "--served-model-name", NAME, *OPTIONS]


@pytest.fixture(scope="package")
def server(serve_command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that the modules of this folder share: bf16 weights, default scheduling."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(serve_command, commands.free_port(), log) as running:
        yield running


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server for one test: start_server(command, port=…, env=…, key=…); stopped when the test ends."""
    started = []

    def start(command: list[str], port: int | None = None, **options) -> Server:
        log = tmp_path / f"server-{len(started)}.log"
        started.append(Server(command, port or commands.free_port(), log, **options))
        return started[-1].wait_ready()

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def large_checkpoint(session_tmp: Path) -> Path:
    """Random weights in the shape of Qwen3-0.6B, bf16, 1.2 GB on disk, with the demo model's tokenizer."""
    return checkpoints.write(
        session_tmp / "qwen3-0.6b", model_path(), hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, vocab_size=151936, max_position_embeddings=40960,
    )  # fmt: skip


@pytest.fixture
def wide_vocabulary(tmp_path: Path) -> Path:
    """A configuration without weights: `vllm bench latency` draws token ids up to 10,000."""
    return checkpoints.write(tmp_path / "wide", model_path(), weights=False, vocab_size=10240)


@pytest.fixture(scope="package")
def no_blanks(model: str) -> dict[str, float]:
    """A logit bias against tokens of nothing but blanks: JSON allows them without end, and a small model likes them."""
    vocabulary = AutoTokenizer.from_pretrained(model)
    return {str(i): -100.0 for i in range(len(vocabulary)) if vocabulary.decode([i]).strip() == ""}


@pytest.fixture(scope="package")
def complete(server: Server) -> Callable:
    """complete(prompt, **options): one greedy completion of 24 tokens through the openai client."""

    def call(prompt, stream: bool = False, max_tokens: int = 24, temperature: float = 0.0, **options):
        own = {"top_k", "min_p", "repetition_penalty", "bad_words", "stop_token_ids", "ignore_eos", "min_tokens",
               "include_stop_str_in_output", "prompt_logprobs", "allowed_token_ids", "structured_outputs",
               "return_token_ids", "skip_special_tokens", "cache_salt"}  # fmt: skip
        extra = {name: options.pop(name) for name in own & options.keys()}
        return server.openai.completions.create(
            model=NAME, prompt=prompt, stream=stream, max_tokens=max_tokens, temperature=temperature,
            extra_body={"return_token_ids": True, **extra}, **options,
        )  # fmt: skip

    return call
