"""Bad requests get a 4xx with a message; the server lives on, and the requests that run meanwhile do not notice."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support import fuzz
from tests.support.server import NAME

PROMPT = "Return a list"
FUZZED_BODIES = 1000


def nested(depth: int) -> dict:
    value: dict = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


BAD_FIELDS = {
    "empty prompt": {"prompt": ""},
    "no prompt": {"prompt": None},
    "empty list of prompts": {"prompt": []},
    "empty list of tokens": {"prompt": [[]]},
    "one of two prompts empty": {"prompt": ["a", ""]},
    "prompt of a wrong type": {"prompt": {"text": "a"}},
    "mixed prompt": {"prompt": ["a", 5]},
    "token out of the vocabulary": {"prompt": [10**6]},
    "negative token": {"prompt": [-1]},
    "prompt too long": {"prompt": "word " * 5000},
    "prompt of tokens too long": {"prompt": [100] * 2049},
    "huge max_tokens": {"max_tokens": 10**9},
    "max_tokens beyond 64 bits": {"max_tokens": 2**70},
    "max_tokens zero": {"max_tokens": 0},
    "max_tokens negative": {"max_tokens": -5},
    "max_tokens text": {"max_tokens": "many"},
    "max_tokens fraction": {"max_tokens": 1.5},
    "n zero": {"n": 0},
    "n negative": {"n": -1},
    "n huge": {"n": 10**6},
    "temperature negative": {"temperature": -1},
    "temperature text": {"temperature": "hot"},
    "top_p zero": {"top_p": 0},
    "top_p above one": {"top_p": 1.5},
    "top_k negative": {"top_k": -2},
    "min_p above one": {"min_p": 2},
    "presence_penalty": {"presence_penalty": 5},
    "frequency_penalty": {"frequency_penalty": -5},
    "repetition_penalty": {"repetition_penalty": 0},
    "logprobs too many": {"logprobs": 1000},
    "logprobs negative": {"logprobs": -2},
    "prompt_logprobs too many": {"prompt_logprobs": 1000},
    "logit_bias of no token": {"logit_bias": {"word": 1}},
    "logit_bias out of the vocabulary": {"logit_bias": {"9999999": 1}},
    "bad_words empty": {"bad_words": [""]},
    "stop empty": {"stop": [""]},
    "stop_token_ids out of the vocabulary": {"stop_token_ids": [-1]},
    "allowed_token_ids empty": {"allowed_token_ids": []},
    "allowed_token_ids out of the vocabulary": {"allowed_token_ids": [10**6]},
    "min_tokens above max_tokens": {"min_tokens": 100},
    "seed beyond 64 bits": {"seed": 2**70},
    "schema of an unknown type": {"structured_outputs": {"json": {"type": "nonsense"}}},
    "schema that is no JSON": {"structured_outputs": {"json": "{"}},
    "schema that nothing satisfies": {"structured_outputs": {"json": {"enum": []}}},
    "schema with a broken reference": {"structured_outputs": {"json": {"$ref": "#/nope"}}},
    "schema with a broken pattern": {"structured_outputs": {"json": {"type": "string", "pattern": "("}}},
    "schema that would need all memory": {"structured_outputs": {"json": {"type": "array", "minItems": 10**9}}},
    "schema nested deeply": {"structured_outputs": {"json": nested(150)}},
    "regex broken": {"structured_outputs": {"regex": "(["}},
    "grammar broken": {"structured_outputs": {"grammar": "root = = ("}},
    "choice empty": {"structured_outputs": {"choice": []}},
    "two constraints": {"structured_outputs": {"choice": ["a"], "regex": "b"}},
    "response_format without schema": {"response_format": {"type": "json_schema"}},
    "prompt embeddings": {"prompt_embeds": "AAAA"},
}
BAD_BODIES = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "half of an object": b'{"model": "served", "prompt": ',
    "not UTF-8": '{"model": "served", "prompt": "café"}'.encode("latin-1"),
    "random bytes": bytes(range(256)),
    "deep list": b"[" * 100_000,
    "deep prompt": b'{"model": "served", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "lone surrogate": b'{"model": "served", "prompt": "\\ud800 a"}',
    "number of 5,000 digits": b'{"model": "served", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
    "NaN": b'{"model": "served", "prompt": "a", "temperature": NaN}',
}
BAD_CHATS = {
    "no messages": {"messages": []},
    "messages of text": {"messages": "Hi"},
    "message without role": {"messages": [{"content": "Hi"}]},
    "content of a number": {"messages": [{"role": "user", "content": 5}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    "too long": {"messages": [{"role": "user", "content": "word " * 5000}]},
    "tools empty": {"tools": []},
    "tool of an unknown name": {"tools": [{"type": "function", "function": {"name": "f"}}],
                                "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "tool_choice without tools": {"tool_choice": "required"},
    "top_logprobs without logprobs": {"top_logprobs": 3},
    "chat template of the request": {"chat_template": "{{ 1 / 0 }}"},
}  # fmt: skip


def assert_refused(answer, status: tuple[int, ...] = (400,)) -> None:
    assert answer.status_code in status, answer.text[:500]
    body = answer.json()
    assert (body.get("error") or {}).get("message") or body.get("detail"), answer.text


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_field_of_a_completion(server, fields):
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 4, **fields}
    assert_refused(server.http.post("/v1/completions", json=body))


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_body_that_is_no_request(server, body):
    assert_refused(server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("fields", BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_field_of_a_chat(server, fields):
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **fields}
    assert_refused(server.http.post("/v1/chat/completions", json=body))


def test_unknown_model_path_method_and_media_type(server):
    body = {"model": "nobody", "prompt": PROMPT}
    assert_refused(server.http.post("/v1/completions", json=body), (404,))
    assert_refused(server.http.post("/v1/nothing", json=body), (404,))
    assert_refused(server.http.get("/v1/completions"), (405,))
    assert_refused(server.http.post("/v1/completions", content=b"a=b", headers={"Content-Type": "text/plain"}))


def test_error_of_a_stream_comes_before_the_stream(server):
    body = {"model": NAME, "prompt": PROMPT, "stream": True, "max_tokens": -1}
    assert_refused(server.http.post("/v1/completions", json=body))


def test_upstream_a_grammar_without_any_text_is_an_internal_error_of_that_request_only(server, complete):
    """Upstream exception: xgrammar accepts a grammar that no text satisfies; the first token is then rejected.

    vLLM ends that request with a 500. Finding it out before would mean compiling every grammar twice, in the API
    process, whose event loop would wait for it. Delete this test when vLLM refuses the request.
    """
    before = complete(PROMPT).choices[0].text
    body = {"model": NAME, "prompt": PROMPT, "structured_outputs": {"grammar": "root ::= root"}}
    assert server.http.post("/v1/completions", json=body).status_code == 500
    assert complete(PROMPT).choices[0].text == before


class Background(threading.Thread):
    """Streams the same greedy requests over and over until told to stop, and counts those that differ."""

    def __init__(self, complete, expected: str):
        super().__init__(daemon=True)
        self.complete, self.expected = complete, expected
        self.stopping, self.rounds, self.wrong = threading.Event(), 0, []

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                chunks = self.complete(PROMPT, stream=True, max_tokens=100, ignore_eos=True)
                text = "".join(chunk.choices[0].text for chunk in chunks)
            except Exception as error:
                text = repr(error)
            self.rounds += 1
            if text != self.expected:
                self.wrong.append(text)


def upstream_error(path: str, body: bytes) -> bool:
    """Whether vLLM 0.32 itself answers 500 here, before any hook of a platform is asked.

    It reads fields of `structured_outputs` before it has checked that this is an object; and a grammar together with
    `allowed_token_ids` that share no token is the case of the test above.
    """
    try:
        request = json.loads(body)
    except ValueError:
        return False
    constraint = request.get("structured_outputs") if isinstance(request, dict) else None
    return constraint is not None and (not isinstance(constraint, dict) or "allowed_token_ids" in request)


def test_fuzzed_bodies_never_break_the_server_or_a_running_stream(server, complete):
    expected = complete(PROMPT, max_tokens=100, ignore_eos=True).choices[0].text
    background = Background(complete, expected)
    background.start()
    # vLLM closes a connection after an internal error without saying so: one connection for each body.
    no_reuse = httpx.Limits(max_keepalive_connections=0)
    client = httpx.Client(base_url=server.http.base_url, timeout=120, limits=no_reuse)

    def send(request: tuple[str, bytes]) -> tuple[int, str, bytes, str]:
        path, body = request
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        return answer.status_code, path, body, answer.text

    with client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, fuzz.bodies(seed=20261120, count=FUZZED_BODIES)))
    background.stopping.set()
    background.join(60)

    broken = [a for a in answers if a[0] not in (200, 400, 404, 413, 415, 422) and not upstream_error(a[1], a[2])]
    assert not broken, f"{len(broken)} of {FUZZED_BODIES}, first: {broken[0]}"
    assert all(text for status, _, _, text in answers if status != 200)
    statuses = Counter(status for status, *_ in answers)
    assert statuses[400] > 300 and statuses[200] > 100, f"bodies must be neither all right nor all wrong: {statuses}"
    assert statuses[500] < 30
    assert background.rounds >= 2 and not background.wrong
    assert server.http.get("/health").status_code == 200
