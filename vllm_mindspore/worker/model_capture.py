"""Captures what runs on the device of a vLLM model: `forward` with the logits of a step, and `compute_logits` alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_mindspore.compiler.capture import (
    MAX_BLOCKS,
    NUM_LOGITS,
    NUM_REQS,
    NUM_ROWS,
    NUM_SLOTS,
    NUM_TOKENS,
    Capture,
    CapturedGraph,
)
from vllm_mindspore.worker.attention import GraphAttentionMetadata


@contextmanager
def replaced_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """While active, every parameter and buffer named in `weights` is that tensor, wherever the model refers to it.

    Modules may be shared (one rotary embedding for all layers) and parameters tied, so tensors are matched by identity.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    replacement = {id(named[name]): tensor for name, tensor in weights.items()}
    originals = []
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            originals.append((slots, dict(slots)))
            slots.update({key: replacement[id(value)] for key, value in slots.items() if id(value) in replacement})
    try:
        yield
    finally:
        for slots, values in originals:
            slots.update(values)


def capture_model(model: torch.nn.Module, vllm_config: VllmConfig) -> Iterator[CapturedGraph]:
    """The graph of a step, then that of `compute_logits` alone, each captured when it is asked for."""
    forward = capture_forward(model, vllm_config)
    hidden_states, _ = forward.results
    hidden_size = hidden_states.meta["val"].shape[-1]
    yield forward
    yield capture_logits(model, hidden_size)


def attention_layers(vllm_config: VllmConfig) -> dict[str, Attention | MLAAttention]:
    """The model's attention layers by name, in order of creation."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if isinstance(layer, (Attention, MLAAttention))}


def cache_owner(layer_name: str, layers: dict[str, Attention | MLAAttention]) -> str:
    """The layer whose KV cache `layer_name` uses: itself, or the one it shares with (latents are never shared)."""
    return getattr(layers[layer_name], "kv_sharing_target_layer_name", None) or layer_name


def cache_row(layer: Attention | MLAAttention) -> tuple[int, int]:
    """What a slot of the layer's KV cache holds: (heads, values of a head)."""
    if isinstance(layer, MLAAttention):
        return 1, layer.head_size
    return layer.num_kv_heads, layer.head_size + layer.head_size_v


def capture_forward(model: torch.nn.Module, vllm_config: VllmConfig) -> CapturedGraph:
    """input_ids [num_tokens] int32, positions [num_tokens] int64, attention inputs, rows [num_rows] int64,
    logits_rows [num_logits] int64 → [num_rows, hidden] float32 and [num_logits, vocabulary] float32.

    The first result is the hidden states of the tokens `rows`, the second the logits of its rows `logits_rows`.

    Every attention layer gets a slot mapping and a block table of its own; `bind_kv_groups` merges those of one group
    once vLLM has formed its KV cache groups.
    """
    capture = Capture("model")
    weights = capture.add_weights(model)
    capture.add_input("tensor", "input_ids", (NUM_TOKENS,), torch.int32, dynamic=(0,))
    capture.add_input("tensor", "positions", (NUM_TOKENS,), torch.int64, dynamic=(0,))
    capture.add_input("tensor", "query_start_loc", (NUM_REQS + 1,), torch.int32, dynamic=(0,))
    capture.add_input("tensor", "seq_lens", (NUM_REQS,), torch.int32, dynamic=(0,))
    capture.add_input("tensor", "rows", (NUM_ROWS,), torch.int64, dynamic=(0,))
    capture.add_input("tensor", "logits_rows", (NUM_LOGITS,), torch.int64, dynamic=(0,))
    layers = attention_layers(vllm_config)
    for name, layer in layers.items():
        if cache_owner(name, layers) == name:
            capture.add_input("kv_cache", name, (NUM_SLOTS, *cache_row(layer)), torch.float32, dynamic=(0,))
            capture.add_input("slot_mapping", name, (NUM_TOKENS,), torch.int64, dynamic=(0,))
            capture.add_input("block_table", name, (NUM_REQS, MAX_BLOCKS), torch.int32, dynamic=(0, 1))
    position = {(graph_input.kind, graph_input.name): i for i, graph_input in enumerate(capture.inputs)}

    def forward(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        def tensor(kind: str, name: str) -> torch.Tensor:
            return tensors[position[kind, name]]

        metadata, slot_mapping, placeholders = {}, {}, {}
        for name, layer in layers.items():
            owner = cache_owner(name, layers)
            metadata[name] = GraphAttentionMetadata(
                tensor("block_table", owner),
                tensor("tensor", "query_start_loc"),
                tensor("tensor", "seq_lens"),
                vllm_config.cache_config.block_size,
            )
            slot_mapping[name] = tensor("slot_mapping", owner)
            placeholders[name], layer.kv_cache = layer.kv_cache, tensor("kv_cache", owner)
        try:
            with (
                replaced_weights(model, {name: tensors[i] for name, i in weights.items()}),
                _no_head_dtype(model),
                set_forward_context(metadata, vllm_config, num_tokens=NUM_TOKENS, slot_mapping=slot_mapping),
            ):
                hidden_states = model.forward(
                    input_ids=tensor("tensor", "input_ids"),
                    positions=tensor("tensor", "positions"),
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )
                selected = torch.ops.vllm_ms.embedding(tensor("tensor", "rows"), hidden_states)
                sampled = torch.ops.vllm_ms.embedding(tensor("tensor", "logits_rows"), selected)
                return selected, model.compute_logits(sampled)
        finally:
            for name, layer in layers.items():
                layer.kv_cache = placeholders[name]

    return capture.trace(forward)


@contextmanager
def _no_head_dtype(model: torch.nn.Module) -> Iterator[None]:
    """While active, output heads are asked for their product whatever its type: all are float32 here.

    vLLM refuses a quantized head whose input is not of the model's type.
    """
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    dtypes = [processor.head_dtype for processor in processors]
    for processor in processors:
        processor.head_dtype = None
    try:
        yield
    finally:
        for processor, dtype in zip(processors, dtypes, strict=True):
            processor.head_dtype = dtype


def capture_logits(model: torch.nn.Module, hidden_size: int) -> CapturedGraph:
    """hidden_states [num_rows, hidden] float32 → logits [num_rows, vocabulary] float32.

    hidden_size: the width of what `forward` returns (not always the model's hidden size: OPT projects out of it).
    """
    capture = Capture("logits")
    weights = capture.add_weights(model)
    row = len(capture.inputs)
    capture.add_input("tensor", "hidden_states", (NUM_TOKENS, hidden_size), torch.float32, dynamic=(0,))

    def compute_logits(tensors: list[torch.Tensor]) -> torch.Tensor:
        with replaced_weights(model, {name: tensors[i] for name, i in weights.items()}), _no_head_dtype(model):
            return model.compute_logits(tensors[row])

    return capture.trace(compute_logits)
