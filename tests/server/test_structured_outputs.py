"""Structured outputs: whatever the model would like to say, the text fits the constraint."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from tests.support.server import NAME

PROMPT = "Describe the function os.listdir as JSON:"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
        "kind": {"enum": ["function", "class", "module"]},
        "arguments": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "deprecated": {"type": "boolean"},
    },
    "required": ["name", "kind", "arguments", "deprecated"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{2,8}: \d{3}-\d{4}"
GRAMMAR = """
root ::= "SELECT " column (", " column)? " FROM " table
column ::= "name" | "size" | "mode"
table ::= "files" | "folders"
"""
SQL = r"SELECT (name|size|mode)(, (name|size|mode))? FROM (files|folders)"


def constrained(complete, constraint, **options):
    return complete(PROMPT, max_tokens=300, structured_outputs=constraint, **options).choices[0]


def test_choice(complete):
    words = ["listing", "removing", "renaming"]
    assert constrained(complete, {"choice": words}).text in words
    sampled = constrained(complete, {"choice": words}, temperature=1.5, seed=4)
    assert sampled.text in words and sampled.finish_reason == "stop"


def test_regex(complete):
    assert re.fullmatch(REGEX, constrained(complete, {"regex": REGEX}).text)


def test_grammar(complete):
    assert re.fullmatch(SQL, constrained(complete, {"grammar": GRAMMAR}).text)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_json_schema(complete, no_blanks, temperature):
    text = constrained(complete, {"json": SCHEMA}, temperature=temperature, seed=6, logit_bias=no_blanks).text
    jsonschema.validate(json.loads(text), SCHEMA)


def test_json_schema_as_response_format_in_a_stream(server, no_blanks):
    stream = server.openai.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=300,
        temperature=0,
        stream=True,
        logit_bias=no_blanks,
        response_format={"type": "json_schema", "json_schema": {"name": "entry", "schema": SCHEMA, "strict": True}},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_json_object(complete):
    """Any JSON object may be long: it must be a prefix of one, and valid JSON when it ended by itself."""
    choice = complete(PROMPT, max_tokens=60, structured_outputs={"json_object": True}).choices[0]
    assert choice.text.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.text), dict)


def test_constrained_and_free_requests_share_a_batch(complete, no_blanks):
    def is_json() -> bool:
        text = constrained(complete, {"json": SCHEMA}, logit_bias=no_blanks).text
        jsonschema.validate(json.loads(text), SCHEMA)
        return True

    free = complete(PROMPT, max_tokens=60, ignore_eos=True).choices[0].text
    jobs = [
        lambda: re.fullmatch(REGEX, constrained(complete, {"regex": REGEX}, temperature=1.0).text),
        lambda: complete(PROMPT, max_tokens=60, ignore_eos=True).choices[0].text == free,
        lambda: re.fullmatch(SQL, constrained(complete, {"grammar": GRAMMAR}, temperature=1.0).text),
        is_json,
    ] * 4
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert all(pool.map(lambda job: job(), jobs))


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": {"type": "number", "multipleOf": 3}},
        {"json": {"type": "array", "uniqueItems": True}},
        {"regex": r"\p{L}+"},
        {"regex": "(?=a)b"},
    ],
    ids=["multipleOf", "uniqueItems", "unicode class", "lookahead"],
)
def test_what_the_grammar_library_cannot_do_is_refused_not_ignored(complete, server, constraint):
    """Also after another request has made the engine load the library (upstream's "auto" fails or ignores here)."""
    constrained(complete, {"regex": REGEX})
    body = {"model": NAME, "prompt": PROMPT, "structured_outputs": constraint}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
