"""The embedded demo model: complete, small, loadable offline, trained, and able to carry any text and any chat."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_mindspore.demo import model_path

FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Written for this test in the manner of Python's documentation; no training text contains it.
SNIPPET = """Return a new list containing the names of all files in the given directory.

If the directory does not exist, an OSError is raised. The optional argument
'pattern' is a string; if it is given, only the names that match the pattern are
returned. The list is in arbitrary order and does not include the special
entries '.' and '..'. This function returns an empty list if there are no files.
"""
WORST_PERPLEXITY = 50


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def perplexity(model, tokenizer, text):
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids).loss.item())


def read_json(name):
    return json.loads((model_path() / name).read_text("utf-8"))


def special_ids(tokenizer):
    return [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]


def chat_ids(tokenizer, *messages, **options):
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options)
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


def test_every_file_is_there_and_the_folder_stays_small():
    assert {path.name for path in model_path().iterdir()} == set(FILES)
    assert sum(path.stat().st_size for path in model_path().iterdir()) < 9e6


def test_finding_the_model_imports_nothing_heavy():
    code = (
        "import sys, vllm_mindspore.demo as d; d.model_path(); print({'torch', 'vllm', 'mindspore'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_weights_are_bf16_finite_and_complete(model):
    with safe_open(model_path() / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_parameters()


def test_configuration_is_qwen3_and_fits_the_tokenizer(tokenizer):
    config = read_json("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["vocab_size"] == len(tokenizer) == 4096
    assert config["max_position_embeddings"] == tokenizer.model_max_length == 2048


def test_generation_stops_at_the_end_of_a_turn_and_of_a_text(tokenizer):
    generation = read_json("generation_config.json")
    assert generation["eos_token_id"] == special_ids(tokenizer)
    assert generation["do_sample"] and 0 < generation["temperature"] < 1 and 0 < generation["top_p"] < 1
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_unseen_documentation_is_unsurprising(model, tokenizer):
    assert perplexity(model, tokenizer, SNIPPET) < WORST_PERPLEXITY


def test_the_perplexity_bound_rejects_one_broken_layer(tokenizer):
    broken = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.neg_()
    assert perplexity(broken, tokenizer, SNIPPET) > WORST_PERPLEXITY


def test_the_end_of_the_context_is_as_well_predicted_as_the_start(model, tokenizer):
    ids = torch.tensor([tokenizer.encode(SNIPPET)])
    page = torch.tensor([tokenizer.encode((model_path() / "README.md").read_text("utf-8"))])[:, : 2048 - ids.shape[1]]
    filler = page.repeat(1, 8)[:, : 2048 - ids.shape[1]]
    with torch.no_grad():
        logits = model(input_ids=torch.cat((filler, ids), 1)).logits[0, filler.shape[1] : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert math.exp(loss.item()) < WORST_PERPLEXITY


@pytest.mark.parametrize(
    "text",
    [
        "  leading, trailing and  double  spaces \n\n\ttabs\r\nand\rreturns ",
        "naïve café Ω≈ç √ 中文字符 日本語 한국어 עברית العربية",
        "🙂👩‍👩‍👧‍👦🇨🇭 e\u0301 \u00e9 \ufb01 \u2028 \u200b \ufeff",
        "\x00\x01\x7f control",
        "".join(chr(code) for code in range(0x20, 0x2FF)),
        "def f(x):\n    return x  # comment\n\n\nclass A:\n\tpass\n",
    ],
)
def test_any_utf8_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_single_tokens(tokenizer):
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert len(tokenizer.encode(token)) == 1


def test_chat_template_renders_every_role(tokenizer):
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"name": "len"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is len?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Return the number of items."},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is len?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "lookup", "arguments": {"name": "len"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nReturn the number of items.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_shows_the_tools_beside_the_system_message(tokenizer):
    tool = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is len?"}]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    system, user = text.split("<|im_end|>\n")[:2]
    assert system.startswith("<|im_start|>system\nBe brief.\n\nTools:\n") and '"name": "lookup"' in system
    assert user == "<|im_start|>user\nWhat is len?"


def test_a_question_about_a_function_gets_its_name_and_a_sentence_and_ends(model, tokenizer):
    ids = chat_ids(tokenizer, {"role": "user", "content": "What does str.strip do?"})
    output = model.generate(ids, max_new_tokens=200, do_sample=False, repetition_penalty=1.0)[0, ids.shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1].item() == special_ids(tokenizer)[0]
    assert answer.startswith("`str.strip(chars=None, /)`\n\nReturn a copy of the string")


def test_a_greeting_is_answered_with_what_the_model_is_for(model, tokenizer):
    ids = chat_ids(tokenizer, {"role": "user", "content": "Hello"})
    output = model.generate(ids, max_new_tokens=100, do_sample=False, repetition_penalty=1.0)[0, ids.shape[1] :]
    assert output[-1].item() == special_ids(tokenizer)[0]
    assert "small demo model" in tokenizer.decode(output)
