"""/v1/chat/completions, with tools."""

import json

import jsonschema
import pytest

from tests.support.server import NAME

MESSAGES = [
    {"role": "system", "content": "You answer questions about Python."},
    {"role": "user", "content": "What does os.listdir return?"},
]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Oslo", "Lima"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}},
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
                "required": ["zone"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.fixture(scope="module")
def chat(server, no_blanks):
    def call(messages=MESSAGES, **options):
        defaults = {"temperature": 0.0, "max_tokens": 32}
        if options.get("tool_choice") not in (None, "auto", "none"):
            defaults |= {"max_tokens": 400, "logit_bias": no_blanks}
        return server.openai.chat.completions.create(model=NAME, messages=messages, **{**defaults, **options})

    return call


def test_answer_has_role_text_and_reason(chat):
    choice = chat().choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")


def test_stream_concatenates_to_the_answer(chat):
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = chat()
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_come_with_alternatives(chat):
    content = chat(logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs.content
    assert 1 <= len(content) <= 5
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(candidate.logprob for candidate in token.top_logprobs)


def test_several_choices_and_max_completion_tokens(chat):
    answer = chat(n=3, temperature=1.0, seed=1, max_tokens=None, max_completion_tokens=6)
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens <= 18


def test_a_final_message_can_be_continued(chat, server):
    messages = [*MESSAGES, {"role": "assistant", "content": "It returns a list"}]
    body = {"add_generation_prompt": False, "continue_final_message": True}
    continued = chat(messages, extra_body=body).choices[0].message.content
    rendered = server.http.post("/tokenize", json={"model": NAME, "messages": messages, **body}).json()["tokens"]
    completed = server.openai.completions.create(model=NAME, prompt=rendered, max_tokens=32, temperature=0.0)
    assert continued == completed.choices[0].text


def check_calls(calls, allowed=("get_weather", "get_time")):
    assert calls
    for call in calls:
        assert call.function.name in allowed
        schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call.function.name)
        jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_required_tool_is_called_with_valid_arguments(chat):
    check_calls(chat(tools=TOOLS, tool_choice="required").choices[0].message.tool_calls)


def test_a_named_tool_is_called_with_valid_arguments(chat):
    named = {"type": "function", "function": {"name": "get_time"}}
    message = chat(tools=TOOLS, tool_choice=named).choices[0].message
    check_calls(message.tool_calls, ("get_time",))


def test_streamed_tool_call_is_the_same(chat):
    named = {"type": "function", "function": {"name": "get_weather"}}
    whole = chat(tools=TOOLS, tool_choice=named).choices[0].message.tool_calls[0]
    name = arguments = ""
    for chunk in chat(tools=TOOLS, tool_choice=named, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, json.loads(arguments)) == (whole.function.name, json.loads(whole.function.arguments))


def test_the_hermes_parser_reads_calls_out_of_the_text(chat):
    """With tool_choice=auto the text is free; a grammar makes the model write one call as Hermes models do."""
    call = r'<tool_call>\n\{"name": "get_time", "arguments": \{"zone": "(UTC|CET)"\}\}\n</tool_call>'
    message = (
        chat(tools=TOOLS, tool_choice="auto", max_tokens=200, extra_body={"structured_outputs": {"regex": call}})
        .choices[0]
        .message
    )
    check_calls(message.tool_calls, ("get_time",))
    assert not message.content


def test_a_conversation_with_tool_results_goes_on(chat):
    call = {"id": "call-1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "12:00"},
    ]
    assert chat(messages, tools=TOOLS, tool_choice="none").choices[0].message.content
