"""Requests that are wrong in thousands of ways, from a seed."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

COMPLETION = {
    "model": "served", "prompt": "Return a list", "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
    "min_p": 0.1, "n": 1, "seed": 1, "stop": ["zz"], "logprobs": 1, "logit_bias": {"5": 1.0}, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "repetition_penalty": 1.1, "bad_words": ["foo"], "stop_token_ids": [7], "min_tokens": 0,
    "echo": False, "stream": False, "ignore_eos": False, "allowed_token_ids": [10, 11, 12], "user": "me",
    "structured_outputs": {"choice": ["a", "b"]}, "response_format": {"type": "text"}, "prompt_logprobs": 0,
}  # fmt: skip
CHAT = {
    "model": "served", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."},
                                    {"role": "user", "content": [{"type": "text", "text": "?"}]}],
    "max_tokens": 3, "temperature": 0.5, "logprobs": True, "top_logprobs": 2, "n": 1, "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "stop": "zz", "stream_options": {"include_usage": True}, "stream": True, "parallel_tool_calls": True,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "boolean"}}},
}  # fmt: skip
TOKENIZE = {"model": "served", "prompt": "some text", "add_special_tokens": True}
DETOKENIZE = {"model": "served", "tokens": [5, 6, 7]}
RESPONSES = {"model": "served", "input": "Hi", "max_output_tokens": 3, "temperature": 0.2}
BODIES = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/v1/responses": RESPONSES,
}
OTHER_FIELDS = (
    "best_of", "suffix", "tools", "foo", "chat_template", "priority", "prompt_embeds", "kv_transfer_params",
    "vllm_xargs", "truncate_prompt_tokens",
)  # fmt: skip
# Nothing here asks for much work when it happens to be valid.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e308, -1e308, float("nan"), float("inf"), 2**31, -(2**31), 2**63, 2**70,
    "", " ", "a", "\x00", "é漢字🙂", "\\ud800", "../../etc/passwd", "{{ 7 * 7 }}", "%s%n", "'; --", "a" * 5000,
    [], [[]], [None], [""], ["a", 5], [-1], [10**9], [2**70], {}, {"": ""}, {"a": {"b": []}}, {"type": "json_object"},
    {"type": "object", "properties": {"a": {"$ref": "#/nope"}}}, {"type": "nonsense"}, {"regex": "("}, {"grammar": "="},
]  # fmt: skip


def bodies(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(path, body): valid requests with a few parts replaced, removed, renamed, nested or corrupted."""
    source = random.Random(seed)
    for _ in range(count):
        path = source.choices(list(BODIES), weights=(5, 5, 1, 1, 1))[0]
        body = _subset(copy.deepcopy(BODIES[path]), source)
        for _ in range(source.choice((0, 1, 1, 1, 2))):
            _mutate(body, source)
        data = json.dumps(body, ensure_ascii=source.random() < 0.5).encode("utf-8", "surrogatepass")
        yield path, _corrupt(data, source) if source.random() < 0.15 else data


def _subset(body: dict, source: random.Random) -> dict:
    """A few of the fields, so that one wrong field does not hide all others."""
    required = ("model", "prompt", "messages", "input", "tokens", "max_tokens", "max_output_tokens")
    return {key: value for key, value in body.items() if key in required or source.random() < 0.25}


def _mutate(body: Any, source: random.Random) -> None:
    places = list(_places(body))
    container, key = source.choice(places)
    action = source.random()
    if action < 0.7:
        container[key] = copy.deepcopy(source.choice(VALUES))
    elif action < 0.8:
        del container[key]
    elif action < 0.9:
        for _ in range(source.choice((1, 20, 200))):
            container[key] = [container[key]] if source.random() < 0.5 else {"a": container[key]}
    elif isinstance(container, dict):
        container[source.choice(OTHER_FIELDS)] = copy.deepcopy(source.choice(VALUES))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _corrupt(data: bytes, source: random.Random) -> bytes:
    where = source.randrange(len(data))
    noise = bytes(source.randrange(256) for _ in range(source.choice((1, 2, 8))))
    return source.choice((data[:where], data[:where] + noise + data[where:], data[:where] + noise + data[where + 2 :]))
