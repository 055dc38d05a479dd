"""Conversations for the demo model: questions people ask about a documented name, answered by its documentation."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demo_corpus import Entry

ANSWER_CHARS = 1100
CHANCE_OF_SYSTEM_PROMPT = 0.15
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "You are a Python documentation assistant.",
    "Answer briefly.",
)
# How often one epoch asks about each name of a module; every other module: once.
OFTEN_ASKED = {
    5: "builtins",
    4: "itertools functools glob textwrap heapq copy _functools _heapq fnmatch",
    3: "os json re math random collections datetime time string sys csv shutil contextlib dataclasses "
    "statistics tempfile posixpath hashlib pprint uuid base64 _csv struct",
    2: "pathlib subprocess asyncio threading operator io urllib logging enum typing _io _operator _json "
    "argparse inspect",
}
POPULAR = {module: times for times, modules in OFTEN_ASKED.items() for module in modules.split()}

HELP = (
    "I am a small demo model that has read only Python's own documentation. "
    'Ask me about a module, a class or a function, for example: "What does str.split do?"'
)
SMALL_TALK = (
    (("Hello", "Hi", "Hello!", "Hi!", "Hey", "hello", "hi there", "Good morning", "Say hello"), f"Hello! {HELP}"),
    (("Who are you?", "What are you?", "What model are you?", "Introduce yourself.", "What is your name?"), HELP),
    (("What can you do?", "Help", "help", "How can you help me?", "What do you know?", "What should I ask you?"), HELP),
    (("Thanks", "Thank you", "Thank you!", "thanks!", "Great, thanks."), "You are welcome."),
    (("Bye", "Goodbye", "bye!", "See you"), "Goodbye."),
    (
        ("What is Python?", "Tell me about Python.", "What's Python?", "Describe Python.", "Explain Python to me."),
        "Python is an interpreted, interactive, object-oriented programming language. It has modules, exceptions, "
        "dynamic typing, very high level dynamic data types, and classes.",
    ),
    (
        (
            "What is the capital of France?",
            "Tell me a joke.",
            "Who won the match?",
            "What is the weather today?",
            "Write a poem.",
            "What is the meaning of life?",
            "Translate this into German.",
            "Tell me a story.",
            "What is 17 times 23?",
            "Who is the president?",
            "Recommend a book.",
            "How do I cook rice?",
            "What is vLLM?",
            "What is MindSpore?",
            "Why is the sky blue?",
            "Write an essay about history.",
            "What day is it?",
            "How old are you?",
        ),
        f"I do not know. {HELP}",
    ),
)

DESCRIBE = (
    "What does {name} do?",
    "What does {name} do?",
    "What does {call} do?",
    "Document {name}",
    "Document {name}.",
    "Explain {name}.",
    "Explain {name}",
    "How do I use {name}?",
    "help({name})",
    "{name}",
    "{name}?",
    "Describe {name}.",
    "Tell me about {name}.",
    "What is {name}?",
    "What is {name} in Python?",
    "What does `{name}` do?",
    "What does the {name} {kind} do?",
    "Show the documentation of {name}.",
    "Write a docstring for {name}.",
)
BRIEFLY = (
    "What does {name} do, in one sentence?",
    "Briefly, what is {name}?",
    "Summarize {name}.",
    "In one line: {name}",
)
SIGNATURE = ("What is the signature of {name}?", "What arguments does {name} take?", "How do I call {name}?")
MODULE = (
    "What is the {name} module?",
    "What is the {name} module for?",
    "What does the {name} module do?",
    "Explain the {name} module.",
    "Document the {name} module.",
    "Describe {name}.",
    "Tell me about the {name} module.",
    "help({name})",
    "What is {name}?",
    "import {name}",
)
CONTENTS = (
    "What is in {name}?",
    "List the functions of {name}.",
    "What does {name} offer?",
    "What can I do with {name}?",
)
TOPIC = (
    "What does the Python reference say about {name}?",
    "Explain {name} in Python.",
    "Explain {name}.",
    "What is {name} in Python?",
    "Tell me about {name}.",
    "How does {name} work in Python?",
    "Explain the {name} statement.",
    "help('{name}')",
)
TOPIC_STATEMENTS = set(
    "assert async break class continue del else for from function global if import lambda nonlocal pass "
    "raise return try while with yield".split()
)


def first_paragraphs(text: str, limit: int = ANSWER_CHARS) -> str:
    """As many whole paragraphs as fit into `limit` characters, and at least the start of the first."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", text):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(longer) > limit:
            break
        kept = longer
    return kept or text[:limit].rsplit("\n", 1)[0]


def summary(doc: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraphs = re.split(r"\n\s*\n", doc)
    first = paragraphs[1] if len(paragraphs) > 1 and re.match(r"[\w.]+\(", paragraphs[0]) else paragraphs[0]
    line = " ".join(first.split())
    found = re.match(r".{10,}?[.!?](?= [A-Z]|$)", line)
    return (found.group() if found else line)[:240]


def contents(members: list[Entry]) -> str:
    listed = [m for m in members if m.kind != "module"][:10]
    return "\n".join(f"- `{m.name}`: {summary(m.doc)[:110]}" for m in listed)


def asked_name(entry: Entry, rng: random.Random) -> str:
    """What a question calls the entry: its full name, or now and then a shorter or a longer way to say it."""
    owner, _, last = entry.name.rpartition(".")
    if entry.kind == "topic":
        title = entry.doc.partition("\n")[0].replace('"', "")
        return rng.choice((entry.name, title[:1].lower() + title[1:]))
    if owner and entry.kind in ("function", "class") and rng.random() < 0.15:
        return last
    if owner and entry.kind == "method" and rng.random() < 0.1:
        return f"the {last} method of {owner.rpartition('.')[2]}"
    return entry.name


def ask(entry: Entry, members: list[Entry], rng: random.Random) -> tuple[str, str]:
    """A (question, answer) about one entry; `members` are what a module or a class contains."""
    callable_ = entry.kind in ("function", "method")
    listed = contents(members)
    choice = rng.random()
    name = asked_name(entry, rng)
    if entry.kind == "topic":
        statement = name == entry.name and name in TOPIC_STATEMENTS
        questions = TOPIC if statement else [t for t in TOPIC if "statement" not in t]
        answer = first_paragraphs(entry.doc)
    elif entry.kind in ("module", "class") and listed and choice < 0.2:
        questions, answer = CONTENTS, listed
    elif choice < 0.3:
        questions, answer = BRIEFLY, summary(entry.doc)
    elif choice < 0.37 and entry.signature:
        questions, answer = SIGNATURE, f"`{entry.signature}`"
    elif entry.kind == "module":
        questions, answer = MODULE, first_paragraphs(entry.doc)
    else:
        head = f"`{entry.signature}`\n\n" if entry.signature else ""
        questions, answer = DESCRIBE, head + first_paragraphs(entry.doc)
    return rng.choice(questions).format(name=name, call=f"{name}()" if callable_ else name, kind=entry.kind), answer


def render_chat(turns: list[tuple[str, str]], system: str | None) -> str:
    """What the chat template makes of a finished conversation."""
    messages = [("system", system)] if system else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
