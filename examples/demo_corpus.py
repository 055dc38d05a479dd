"""The text that the demo model learns from: what ships with the running Python, and conversations made out of it.

Nothing is downloaded. The documentation is read from four places: docstrings in the standard library's source,
docstrings of modules written in C (by inspection), the language reference inside `pydoc_data.topics`, and the prose
comments and source of the standard library. For one Python installation the result is the same on every run; every
random choice takes a seed.
"""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import io
import pkgutil
import random
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo_chat import CHANCE_OF_SYSTEM_PROMPT, POPULAR, SMALL_TALK, SYSTEM_PROMPTS, ask, render_chat

SKIPPED_FOLDERS = set(
    "test tests idle_test idlelib site-packages lib2to3 ensurepip turtledemo pydoc_data __pycache__".split()
)
SKIPPED_IMPORTS = {"antigravity", "this", "idlelib", "lib2to3", "turtledemo", "__main__"}
HELD_OUT = set(
    "bisect chunk cmd colorsys graphlib mailcap netrc nntplib sched shelve sndhdr tracemalloc xdrlib zipapp".split()
)
READMES = ("email/architecture.rst", "idlelib/README.txt", "idlelib/extend.txt", "idlelib/help.html")
SOURCE_SHARE = 1 / 6
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """One documented thing: `name` as people write it (`os.path.join`, `str.split`), `signature` "" if unknown."""

    name: str
    kind: str
    signature: str
    doc: str
    module: str

    @property
    def public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True)
class Corpus:
    """`pages`, `topics` and `sources` are plain text; the `held_out` parts are never trained on."""

    entries: list[Entry]
    pages: list[str]
    topics: dict[str, str]
    prose: list[str]
    sources: list[str]
    held_out_entries: list[Entry]
    held_out_pages: list[str]


def source_files() -> Iterator[tuple[str, str]]:
    """(dotted module name, source text) of the standard library's own modules, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        parts = relative.with_suffix("").parts
        try:
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def stdlib_modules() -> Iterator[object]:
    """Every module of the standard library that imports here, and the submodules of its packages."""
    for name in sorted(sys.stdlib_module_names - SKIPPED_IMPORTS):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield module
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not SKIPPED_FOLDERS & {info.name} and not info.name.startswith("_"):
                try:
                    yield importlib.import_module(f"{name}.{info.name}")
                except Exception:  # a platform's own submodule may fail in any way it likes
                    continue


def public_names(modules: list) -> dict[tuple[str, str], str]:
    """(defining module, name there) -> the name people write, as `("asyncio.tasks", "gather") -> "asyncio.gather"`."""
    names: dict[tuple[str, str], str] = {}
    for module in modules:
        public = "os.path" if module.__name__ == "posixpath" else module.__name__
        if public.startswith("_"):
            continue
        prefix = "" if public == "builtins" else f"{public}."
        for name in sorted(getattr(module, "__all__", () if prefix else vars(module))):
            value = getattr(module, name, None)
            home = getattr(value, "__module__", None)
            if not isinstance(home, str) or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            if not prefix or home.startswith((public, "_", "posix")):
                key = (home, getattr(value, "__qualname__", name))
                names[key] = min(names.get(key, prefix + name), prefix + name, key=lambda n: (len(n), n))
    return names


def clean(doc: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", inspect.cleandoc(doc)).strip()


def without_self(arguments: str) -> str:
    return re.sub(r"^(self|cls)(, /)?(, |$)|^\$?(self|type)(, /)?(, |$)", "", arguments)


def kind_and_arguments(node: Definition, method: bool) -> tuple[str, str | None]:
    """What a definition is, and its arguments without `self`; None where a signature says nothing."""
    if isinstance(node, ast.ClassDef):
        makers = [c for c in node.body if isinstance(c, ast.FunctionDef) and c.name == "__init__"]
        return "class", without_self(ast.unparse(makers[0].args)) if makers else None
    if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return "attribute", None
    arguments = ast.unparse(node.args)
    return ("method", without_self(arguments)) if method else ("function", arguments)


def entries_of_source(module: str, tree: ast.Module, names: dict[tuple[str, str], str]) -> Iterator[Entry]:
    """The docstrings of one source file, in its order."""
    shown = "os.path" if module == "posixpath" else module

    def visit(node: ast.AST, qualname: str) -> Iterator[Entry]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, Definition):
                continue
            here = f"{qualname}.{child.name}" if qualname else child.name
            top, _, rest = here.partition(".")
            name = names.get((module, top), f"{shown}.{top}") + (f".{rest}" if rest else "")
            name = names.get((module, here), name)
            kind, arguments = kind_and_arguments(child, isinstance(node, ast.ClassDef))
            doc = ast.get_docstring(child, clean=False)
            if doc and doc.strip():
                yield Entry(name, kind, "" if arguments is None else f"{name}({arguments})", clean(doc), shown)
            if isinstance(child, ast.ClassDef):
                yield from visit(child, here)

    doc = ast.get_docstring(tree, clean=False)
    if doc and doc.strip():
        yield Entry(shown, "module", "", clean(doc), shown)
    yield from visit(tree, "")


def kind_of(value: object, inside_class: bool) -> str | None:
    if inspect.isclass(value):
        return "class"
    if inspect.isroutine(value):
        return "method" if inside_class else "function"
    return "attribute" if inside_class and inspect.isdatadescriptor(value) else None


def builtin_signature(value: object, name: str) -> str:
    try:
        signature = inspect.signature(value).replace(return_annotation=inspect.Signature.empty)
    except Exception:  # most C functions have none, and reading a broken one fails in many ways
        return ""
    return f"{name}({without_self(str(signature)[1:-1])})"


def entries_of_builtin(module: object, names: dict[tuple[str, str], str]) -> Iterator[Entry]:
    """The docstrings of a module without Python source, in the order of its names."""

    def visit(owner: object, prefix: str, depth: int) -> Iterator[Entry]:
        for name, value in sorted(vars(owner).items()):
            kind = kind_of(value, depth > 0)
            home = getattr(value, "__module__", None) or module.__name__
            accelerates = module.__name__.startswith("_") and home in sys.stdlib_module_names
            foreign = depth == 0 and home != module.__name__ and not accelerates
            if kind is None or name.startswith("__") or foreign:
                continue
            shown = prefix + name if depth else names.get((home, name), prefix + name)
            doc = getattr(value, "__doc__", None)
            if isinstance(doc, str) and doc.strip():
                signature = "" if kind == "attribute" else builtin_signature(value, shown)
                yield Entry(shown, kind, signature, clean(doc), module.__name__)
            if kind == "class" and depth == 0:
                yield from visit(value, f"{shown}.", 1)

    if module.__doc__:
        yield Entry(module.__name__, "module", "", clean(module.__doc__), module.__name__)
    yield from visit(module, "" if module.__name__ == "builtins" else f"{module.__name__}.", 0)


def page(entries: list[Entry]) -> str:
    """One module's reference, laid out as `help()` does: the signature, then the text indented."""
    blocks = []
    for entry in entries:
        if entry.kind == "module":
            blocks.append(f"{entry.name} module\n\n{entry.doc}")
        else:
            head = {"class": "class ", "attribute": "attribute "}.get(entry.kind, "") + (entry.signature or entry.name)
            blocks.append(f"{head}\n{textwrap.indent(entry.doc, '    ')}")
    return "\n\n".join(blocks)


def comment_blocks(source: str) -> str:
    """The prose among the comments: at least two full lines in a row, mostly letters, no licence texts."""
    blocks, lines, last = [], [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            if token.start[0] != last + 1:
                blocks.append(lines)
                lines = []
            lines.append(token.string.lstrip("#").removeprefix(" ").rstrip())
            last = token.start[0]
    blocks.append(lines)
    texts = ["\n".join(block).strip() for block in blocks if len(block) >= 2]
    return "\n\n".join(
        text for text in texts
        if len(text) >= 80 and sum(c.isalpha() or c == " " for c in text) > 0.8 * len(text)
        and not re.search(r"copyright|licen[sc]e|warrant", text, re.I)
    )  # fmt: skip


def readmes() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for name in READMES:
        path = root / name
        if path.exists():
            text = path.read_text("utf-8")
            if path.suffix == ".html":
                text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?s)<(script|style|head).*?</\1>", "", text)))
            texts.append(re.sub(r"\n\s*\n\s*\n+", "\n\n", text).strip())
    return texts


def collect() -> Corpus:
    """Read the running Python's documentation; takes a few seconds and imports most of the standard library."""
    from pydoc_data.topics import topics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = list(stdlib_modules())
        names = public_names(modules)
        by_module: list[list[Entry]] = []
        prose, sources = readmes(), []
        for module, source in source_files():
            tree = ast.parse(source)
            by_module.append(list(entries_of_source(module, tree, names)))
            if module.split(".")[0] in HELD_OUT:
                continue
            prose.append(comment_blocks(source))
            if sum(c.isdigit() for c in source) < 0.08 * len(source):
                sources.append(source)
        for module in modules:
            if not getattr(module, "__file__", "").endswith((".py", ".pyc")) and "." not in module.__name__:
                by_module.append(list(entries_of_builtin(module, names)))
    trained, held_out = [], []
    seen: set[tuple[str, str]] = set()
    for group in by_module:
        fresh = [e for e in group if (e.name, e.doc) not in seen]
        seen.update((e.name, e.doc) for e in fresh)
        if fresh:
            (held_out if fresh[0].module.split(".")[0].lstrip("_") in HELD_OUT else trained).append(fresh)
    return Corpus(
        entries=[e for group in trained for e in group],
        pages=[page(group) for group in trained],
        topics={name: clean(text) for name, text in sorted(topics.items())},
        prose=[text for text in prose if text],
        sources=sources,
        held_out_entries=[e for group in held_out for e in group],
        held_out_pages=[page(group) for group in held_out],
    )


def conversations(entries: list[Entry], topics: dict[str, str], seed: int) -> list[str]:
    """One or more questions about every public entry, some of them as turns of one conversation."""
    rng = random.Random(f"chat {seed}")
    members: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.public:
            members.setdefault(entry.name.rpartition(".")[0], []).append(entry)
    pairs = []
    for entry in sorted((e for e in entries if e.public), key=lambda e: e.name):
        for _ in range(POPULAR.get(entry.module.split(".")[0], 1)):
            pairs.append(ask(entry, members.get(entry.name, []), rng))
    for name, text in topics.items():
        for _ in range(4):
            pairs.append(ask(Entry(name, "topic", "", text, ""), [], rng))
    groups = []
    while pairs:
        size = rng.choices((1, 2, 3, 4), (80, 10, 6, 4))[0]
        groups.append(pairs[:size])
        pairs = pairs[size:]
    if topics:
        groups += [[(rng.choice(questions), answer)] for questions, answer in SMALL_TALK for _ in range(30)]
    return [
        render_chat(group, rng.choice(SYSTEM_PROMPTS) if rng.random() < CHANCE_OF_SYSTEM_PROMPT else None)
        for group in groups
    ]


def documents(corpus: Corpus, epoch: int) -> list[str]:
    """The training text of one epoch, shuffled; questions and the sample of source files differ from epoch to epoch."""
    rng = random.Random(f"documents {epoch}")
    plain = corpus.pages + list(corpus.topics.values()) + corpus.prose
    plain += rng.sample(corpus.sources, round(SOURCE_SHARE * len(corpus.sources)))
    texts = plain + conversations(corpus.entries, corpus.topics, epoch)
    rng.shuffle(texts)
    return texts


def held_out_documents(corpus: Corpus) -> tuple[list[str], list[str]]:
    """(reference pages, conversations) of the modules in `HELD_OUT`."""
    return corpus.held_out_pages, conversations(corpus.held_out_entries, {}, seed=-1)
