"""Train the demo model that `make serve` serves: `python examples/train_demo_model.py --out DIR [--minutes N]`.

A Qwen3 of four million parameters learns, on the CPU, the documentation that ships with the running Python (see
demo_corpus.py). DIR then holds a checkpoint for Hugging Face transformers and vLLM: bf16 safetensors, tokenizer, chat
template, sampling defaults and a model card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_card import CHAT_TEMPLATE, GENERATION, MARKUP_TOKENS, SPECIAL_TOKENS, write_card
from demo_chat import render_chat
from demo_corpus import Corpus, collect, documents, held_out_documents
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 4096
TOKENS_PER_STEP = 4096
# Most steps are short because they are faster; the long ones are why the model may be asked about 2,048 positions.
SEQUENCE_LENGTHS = (512, 512, 512, 1024, 512, 512, 512, 1024, 512, 2048)
LONGEST = max(SEQUENCE_LENGTHS)
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Recipe:
    """`steps` None: as many as fit into `minutes`, the learning rate following the clock."""

    minutes: float
    steps: int | None
    muon_rate: float = 5e-3
    adamw_rate: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    seed: int = 0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token and nothing is normalised, so any UTF-8 text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKUP_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One flat int64 tensor of token ids, `<|endoftext|>` after each text."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids)


def batches(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(epoch, inputs, targets) for ever; both are [TOKENS_PER_STEP / length, length] int64, packed without padding."""
    epoch, step, ids = -1, 0, torch.empty(0, dtype=torch.int64)
    while True:
        while len(ids) <= TOKENS_PER_STEP:
            epoch += 1
            ids = torch.cat((ids, encode(tokenizer, documents(corpus, epoch))))
        length = SEQUENCE_LENGTHS[step % len(SEQUENCE_LENGTHS)]
        yield epoch, ids[:TOKENS_PER_STEP].view(-1, length), ids[1 : TOKENS_PER_STEP + 1].view(-1, length)
        ids = ids[TOKENS_PER_STEP:]
        step += 1


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONGEST,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def mean_loss(model: Qwen3ForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; matrix products in bf16, the softmax in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = torch.nn.functional.linear(hidden, model.lm_head.weight)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, ids: torch.Tensor, length: int) -> float:
    """Mean loss in nats per token over `ids` in windows of `length`; the rest that fills no window is left out."""
    rows = (len(ids) - 1) // length
    inputs, targets = ids[: rows * length].view(rows, length), ids[1 : rows * length + 1].view(rows, length)
    losses = [mean_loss(model, inputs[i : i + 1], targets[i : i + 1]).item() for i in range(rows)]
    return sum(losses) / len(losses)


def optimizers_for(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": [model.model.embed_tokens.weight]}, {"params": norms, "weight_decay": 0.0}]
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=recipe.adamw_rate, weight_decay=decay, betas=(0.9, 0.98), fused=True),
    ]


def schedule(progress: float, warmup: float) -> float:
    """The share of the peak learning rate: linear warm-up, then linear decay to nothing at progress 1."""
    return min(progress / warmup, (1 - progress) / (1 - warmup))


def train(
    model: Qwen3ForCausalLM, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, held_out: torch.Tensor, recipe: Recipe
) -> dict:
    """Train in place; returns the facts about the run that the model card prints."""
    optimizers = optimizers_for(model, recipe)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    fast_loss = torch.compile(mean_loss, dynamic=False)
    started = reported = time.monotonic()
    running, step, epoch = math.nan, 0, 0
    for epoch, inputs, targets in batches(corpus, tokenizer):
        elapsed = (time.monotonic() - started) / 60
        progress = step / recipe.steps if recipe.steps else elapsed / recipe.minutes
        if progress >= 1:
            break
        for group, peak in groups:
            group["lr"] = peak * schedule(max(progress, 1e-3), recipe.warmup)
        loss = fast_loss(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if math.isnan(running) else 0.97 * running + 0.03 * loss.item()
        if time.monotonic() - reported > 30:
            reported = time.monotonic()
            speed = step * TOKENS_PER_STEP / (60 * max(elapsed, 1e-9))
            held = evaluate(model, held_out, 512)
            losses = f"loss {running:.3f}  held out {held:.3f}"
            say(f"{progress:5.1%}  step {step}  epoch {epoch}  {losses}  {speed:,.0f} tokens/s")
    return {"steps": step, "epochs": epoch + 1, "minutes": (time.monotonic() - started) / 60, "train_loss": running}


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bf16 checkpoint; the bf16 weights replace those of `model`."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")],
        pad_token_id=tokenizer.pad_token_id,
        **GENERATION,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class that every version of transformers knows, instead of version 5's own and its notes about this machine.
    settings = folder / "tokenizer_config.json"
    written = json.loads(settings.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    kept = {name: value for name, value in written.items() if name not in ("backend", "is_local", "local_files_only")}
    settings.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target` by renaming, so that a reader never finds half a checkpoint."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def check_chat_format(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    if tokenizer.apply_chat_template(messages, tokenize=False) != render_chat([("q", "a")], "s"):
        raise AssertionError("the chat template and the training text disagree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the finished checkpoint; replaced if it exists"
    )
    parser.add_argument("--minutes", type=float, default=45, help="training time (default 45)")
    parser.add_argument("--steps", type=int, help="train exactly so many steps instead of watching the clock")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    arguments = parser.parse_args()
    recipe = Recipe(arguments.minutes, arguments.steps)
    torch.set_num_threads(arguments.threads)

    corpus = collect()
    first_epoch = documents(corpus, 0)
    say(f"{len(corpus.entries):,} documented names, {sum(map(len, first_epoch)) / 1e6:.1f} million characters an epoch")
    tokenizer = train_tokenizer(first_epoch)
    check_chat_format(tokenizer)
    pages, chats = (encode(tokenizer, texts) for texts in held_out_documents(corpus))
    model = new_model(tokenizer, recipe.seed)
    facts = {
        "parameters": model.num_parameters(),
        "python": platform.python_version(),
        "step_tokens": TOKENS_PER_STEP,
        "threads": arguments.threads,
        "optimizer": f"Muon (peak rate {recipe.muon_rate:g}; AdamW, {recipe.adamw_rate:g}, for embedding and norms)",
        "options": f"--steps {recipe.steps}" if recipe.steps else f"--minutes {recipe.minutes:g}",
        "epoch_tokens": len(encode(tokenizer, first_epoch)),
    }
    say(f"{facts['parameters']:,} parameters, {facts['epoch_tokens']:,} tokens an epoch, {len(pages):,} held out")
    facts |= train(model, corpus, tokenizer, pages, recipe)

    unfinished = arguments.out.with_name(f".{arguments.out.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(model, tokenizer, unfinished)
    model.eval()
    characters = sum(len(page) + 1 for page in corpus.held_out_pages)
    facts |= {
        "held_out_loss": evaluate(model, pages, 512),
        "held_out_long_loss": evaluate(model, pages, LONGEST),
        "held_out_chat_loss": evaluate(model, chats, 512),
        "characters_per_token": characters / len(pages),
    }
    write_card(unfinished / "README.md", model, tokenizer, facts)
    replace_folder(unfinished, arguments.out)
    say(f"held-out loss {facts['held_out_loss']:.3f}; the checkpoint is in {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
