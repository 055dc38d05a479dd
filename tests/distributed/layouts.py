"""Engines and servers of several ranks on the small families, for tests of their tokens."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from vllm import LLM

from tests.models.checkpoints import checkpoint
from tests.support import commands
from tests.support.server import NAME, Server

# A connection that is kept may be closed by the server, after five idle seconds, in the moment it is used again.
ONCE = {"Connection": "close"}
SETTINGS = dict(max_model_len=256, max_num_seqs=8, max_num_batched_tokens=512, seed=0)


@contextmanager
def engine(name: str, folder: Path | None = None, **options) -> Iterator[LLM]:
    """An `LLM` on family `name` in float32, its ranks in processes of their own. folder: another checkpoint of it."""
    options = {"disable_log_stats": True, **SETTINGS, **options}
    llm = LLM(str(folder or checkpoint(name)), dtype="float32", **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def serve(name: str, *options: str, folder: Path | None = None) -> list[str]:
    """The command of a server on family `name` in float32. folder: another checkpoint of it."""
    settings = [word for key, value in SETTINGS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = ["vllm", "serve", str(folder or checkpoint(name)), "--backend", "mindspore", "--served-model-name", NAME]
    return [*command, "--dtype", "float32", *settings, *options]


def server(name: str, log: Path, *options: str, folder: Path | None = None) -> Server:
    return Server(serve(name, *options, folder=folder), commands.free_port(), log)


def served_greedy(
    running: Server, prompts: list[list[int]], max_tokens: int, engine: int | None = None
) -> list[list[int]]:
    """Greedy continuations of prompts that are sent at once. engine: the data-parallel one that gets all of them."""
    headers = ONCE if engine is None else {**ONCE, "X-data-parallel-rank": str(engine)}

    def complete(prompt: list[int]) -> list[int]:
        answer = running.openai.completions.create(
            model=NAME, prompt=prompt, temperature=0, max_tokens=max_tokens,
            extra_body={"ignore_eos": True, "return_token_ids": True}, extra_headers=headers,
        )  # fmt: skip
        return json.loads(answer.choices[0].model_dump_json())["token_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(complete, prompts))
