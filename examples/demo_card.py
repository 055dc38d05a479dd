"""What a finished demo model carries besides weights: special tokens, chat template, sampling defaults, model card."""

from __future__ import annotations

from pathlib import Path

import torch

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Not special, so that an answer shows them: vLLM's parsers for tools and reasoning look for these tokens.
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}

# ChatML; tools are shown to the model in the Hermes form, which vLLM's `hermes` parser reads back.
CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') + 'Tools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- 'Call one with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- elif system %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set called = call.function or call %}
            {{- '\\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": ' + called.name | tojson + ', "arguments": ' }}
            {{- called.arguments if called.arguments is string else called.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

COMPLETIONS = (
    "Return a list of",
    "os.path.join(",
    'The "for" statement is used to',
    "class collections.OrderedDict",
    "Raise a ValueError if",
    'def read_lines(path):\n    """',
)
CHATS = ("What does str.split do?", "Document os.path.join", "What is the json module for?", "Hello, who are you?")

CARD = """\
---
license: psf-2.0
language: en
library_name: transformers
---

# Python documentation, {millions:.1f}M parameters

The model that `make serve` serves when no model is named. It is real (trained, with its own tokenizer and chat
template) and tiny: it exists so that every layer of a served model can be seen at work within seconds, without a
download. It is not a source of facts.

| | |
|---|---|
| architecture | Qwen3, {layers} layers, hidden {hidden}, MLP {mlp}, tied embeddings |
| attention | {heads} heads of {head_dim}, {kv_heads} KV heads |
| parameters | {parameters:,}, stored as bf16 |
| tokenizer | byte-level BPE, {vocab} tokens, {characters_per_token:.2f} characters per token of held-out text |
| context | {context} tokens; a tenth of the training steps had that length |
| training loss | {train_loss:.3f} nats per token |
| held-out loss | {held_out_loss:.3f} nats per token, {bits:.2f} bits per character |
| held-out loss, windows of {context} | {held_out_long_loss:.3f} nats per token |
| held-out loss, chats | {held_out_chat_loss:.3f} nats per token |

## Data and licence

Text that ships with Python {python}, nothing else: the docstrings of the standard library (source and C modules),
the language reference in `pydoc_data.topics`, prose comments, four README-like files, and in every epoch a different
sixth of the library's source files; without tests, `lib2to3`, IDLE's code and site-packages. A good third of each
epoch are questions and answers made from the docstrings by templates, and a dozen lines of small talk written for it.
An epoch has {epoch_tokens:,} tokens. Held out, and never trained on in any form, are these modules:
{held_out_modules}.

Python's documentation and standard library are copyright of the Python Software Foundation and others, under the PSF
licence (https://docs.python.org/3/license.html); a few modules of the library carry permissive licences of their own.
The weights are given under the same terms.

## Training

`python examples/train_demo_model.py --out DIR {options}`: {steps:,} steps of {step_tokens:,} packed tokens,
{epochs} epochs begun, {minutes:.0f} minutes on {threads} CPU threads (bf16 autocast, torch.compile);
{optimizer}; linear warm-up and linear decay of the
learning rate to zero. The text and its order depend only on the Python installation and the seed; the number of steps
depends on the machine and on what else it does unless `--steps` is given.

## Limits

It has the layout and the phrasing of Python's documentation and little of its content: an answer about a function
usually names that function and then describes, fluently, something else. Signatures and statements are mostly wrong.
Greedy decoding without a repetition penalty may loop. English only. It cannot count, reason, write programs, or decide
to call a tool; templates and parsers for tools and reasoning work with it only as plumbing.

## Samples

Printed by the training script with the sampling defaults of `generation_config.json` and seed 0, not selected.

{samples}
"""


@torch.no_grad()
def sample(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """The continuation of `prompt`, special tokens shown, with the checkpoint's own sampling defaults."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    torch.manual_seed(0)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=False)


def samples(model, tokenizer) -> str:
    parts = []
    for prompt in COMPLETIONS:
        parts.append(f"Completion of `{prompt!r}`:\n\n~~~text\n{prompt}{sample(model, tokenizer, prompt, 80)}\n~~~")
    for question in CHATS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        parts.append(f"Chat:\n\n~~~text\n{prompt}{sample(model, tokenizer, prompt, 256)}\n~~~")
    return "\n\n".join(parts)


def write_card(path: Path, model, tokenizer, facts: dict) -> None:
    from demo_corpus import HELD_OUT

    config = model.config
    path.write_text(
        CARD.format(
            millions=facts["parameters"] / 1e6,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            kv_heads=config.num_key_value_heads,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            bits=facts["held_out_loss"] / 0.6931471805599453 / facts["characters_per_token"],
            held_out_modules=", ".join(sorted(HELD_OUT)),
            samples=samples(model, tokenizer),
            **facts,
        ),
        "utf-8",
    )
