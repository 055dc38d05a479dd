"""Captures what runs on the device of a vLLM model: `forward` with the logits of a step, and `compute_logits` alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.sequence import IntermediateTensors

from vllm_mindspore.compiler.capture import (
    MAX_BLOCKS,
    NUM_ALL_TOKENS,
    NUM_LOGITS,
    NUM_REQS,
    NUM_ROWS,
    NUM_SLOTS,
    NUM_TOKENS,
    Capture,
    CapturedGraph,
)
from vllm_mindspore.models.expert_parallel import TOKEN_RANKS
from vllm_mindspore.worker import facts
from vllm_mindspore.worker.attention import GraphAttentionMetadata
from vllm_mindspore.worker.mla import IndexerKeys
from vllm_mindspore.worker.moe import MindSporeMoERunner

ATTENTION_LAYERS = (Attention, MLAAttention, IndexerKeys)  # those that have operators of ours
# Names of graph inputs
RECEIVED = "received_"  # what a pipeline stage gets from the one before
HIDDEN_STATES = "hidden_states"  # of the model, for its draft


@contextmanager
def replaced_weights(
    model: torch.nn.Module, named: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> Iterator[None]:
    """While active, every parameter and buffer that is in `named` is the tensor of that name in `weights`, wherever
    the model refers to it.

    Modules may be shared (one rotary embedding for all layers) and parameters tied, so tensors are matched by identity.
    """
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


def capture_draft(
    draft: torch.nn.Module, vllm_config: VllmConfig, tensors: dict[str, torch.Tensor], hidden_size: int
) -> CapturedGraph:
    """input_ids [num_tokens] int32, positions [num_tokens] int64, hidden_states [num_tokens, hidden_size] float32,
    attention inputs, rows [num_rows] int64 → [num_rows, hidden] float32, [num_rows, vocabulary] float32 and, for each
    layer of experts, [num_experts] float32.

    hidden_states: of the model at these tokens, whose next ones are input_ids. The first result is what takes their
    place when the next but one is drafted, at the tokens `rows`; the second their logits. tensors: the draft's
    parameters and buffers, each under the one name that it has in all graphs.
    """
    capture = Capture("draft")
    inputs = StepInputs(capture, draft, vllm_config, tensors, hidden_size)

    def forward(values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs.values = values
        with inputs.context(draft):
            output = draft.forward(
                input_ids=inputs("input_ids"), positions=inputs("positions"), hidden_states=inputs(HIDDEN_STATES)
            )
            for_logits, for_next = output if isinstance(output, tuple) else (output, output)
            sampled, following = (torch.ops.vllm_ms.embedding(inputs("rows"), rows) for rows in (for_logits, for_next))
            counts = [layer.tokens_of_experts for layer in inputs.experts.values()]
            return following, draft.compute_logits(sampled), *counts

    return capture.trace(forward)


def capture_model(
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    draft: tuple[torch.nn.Module, dict[str, torch.Tensor]] | None = None,
) -> Iterator[CapturedGraph]:
    """The graph of a step, then that of `compute_logits` alone where there is a head, then that of the draft (a model
    and its tensors by name), each when it is asked for."""
    forward = capture_forward(model, vllm_config)
    hidden_states, *_ = forward.results
    hidden_size = hidden_states.meta["val"].shape[-1]
    yield forward
    if get_pp_group().is_last_rank:
        yield capture_logits(model, hidden_size)
    if draft is not None:
        yield capture_draft(draft[0], vllm_config, draft[1], hidden_size)


def tensors_between_stages(model: torch.nn.Module) -> dict[str, int]:
    """What a pipeline stage passes to the next one, by name: the width of each, in the order of names."""
    empty = model.make_empty_intermediate_tensors(batch_size=1, dtype=torch.float32, device=torch.device("cpu"))
    return {name: tensor.shape[-1] for name, tensor in sorted(empty.items())}


def attention_layers(vllm_config: VllmConfig, model: torch.nn.Module | None = None) -> dict[str, AttentionLayerBase]:
    """The attention layers and keys of indexers (`ATTENTION_LAYERS`) of the engine, or of one of its models, by name,
    in order of creation."""
    return _layers_of(vllm_config, ATTENTION_LAYERS, model)


def _layers_of(vllm_config: VllmConfig, classes, model: torch.nn.Module | None) -> dict:
    context = vllm_config.compilation_config.static_forward_context
    inside = None if model is None else set(model.modules())
    return {
        name: layer
        for name, layer in context.items()
        if isinstance(layer, classes) and (inside is None or layer in inside)
    }


def cache_owner(layer_name: str, layers: dict[str, AttentionLayerBase]) -> str:
    """The layer whose KV cache `layer_name` uses: itself, or the one it shares with (latents are never shared)."""
    return getattr(layers[layer_name], "kv_sharing_target_layer_name", None) or layer_name


def cache_row(layer: AttentionLayerBase) -> tuple[int, int]:
    """What a slot of the layer's KV cache holds: (heads, values of a head)."""
    if isinstance(layer, Attention):
        return layer.num_kv_heads, layer.head_size + layer.head_size_v
    return 1, layer.head_size


def expert_layers(vllm_config: VllmConfig, model: torch.nn.Module) -> dict[str, MindSporeMoERunner]:
    """The model's layers of experts by name, in order of creation."""
    return _layers_of(vllm_config, MindSporeMoERunner, model)


class StepInputs:
    """The inputs of a step's graph, by kind and name."""

    def __init__(
        self,
        capture: Capture,
        model: torch.nn.Module,
        vllm_config: VllmConfig,
        tensors: dict[str, torch.Tensor],
        hidden_size: int | None = None,
    ):
        """tensors: the model's parameters and buffers by name. hidden_size: of a draft's model."""
        self.tensors, self.weights = tensors, capture.add_weights(tensors)
        self.layers = attention_layers(vllm_config, model)
        self.experts = expert_layers(vllm_config, model)
        self.ranks = vllm_config.parallel_config.data_parallel_size if self.experts else 1
        self.vllm_config = vllm_config
        self._add_tokens(capture, hidden_size)
        self.received: list[str] = []
        if not get_pp_group().is_first_rank:
            for name, width in tensors_between_stages(model).items():
                capture.add_input("tensor", RECEIVED + name, (NUM_TOKENS, width), torch.float32, dynamic=(0,))
                self.received.append(name)
        for name, layer in self.layers.items():
            if cache_owner(name, self.layers) == name:
                capture.add_input("kv_cache", name, (NUM_SLOTS, *cache_row(layer)), torch.float32, dynamic=(0,))
                capture.add_input("slot_mapping", name, (NUM_TOKENS,), torch.int64, dynamic=(0,))
                capture.add_input("block_table", name, (NUM_REQS, MAX_BLOCKS), torch.int32, dynamic=(0, 1))
        self.position = {(graph_input.kind, graph_input.name): i for i, graph_input in enumerate(capture.inputs)}
        self.values: list[torch.Tensor] = []

    def _add_tokens(self, capture: Capture, hidden_size: int | None) -> None:
        capture.add_input("tensor", "input_ids", (NUM_TOKENS,), torch.int32, dynamic=(0,))
        capture.add_input("tensor", "positions", (NUM_TOKENS,), torch.int64, dynamic=(0,))
        capture.add_input("tensor", "query_start_loc", (NUM_REQS + 1,), torch.int32, dynamic=(0,))
        capture.add_input("tensor", "seq_lens", (NUM_REQS,), torch.int32, dynamic=(0,))
        capture.add_input("tensor", "rows", (NUM_ROWS,), torch.int64, dynamic=(0,))
        if hidden_size is None:
            capture.add_input("tensor", "logits_rows", (NUM_LOGITS,), torch.int64, dynamic=(0,))
        else:
            capture.add_input("tensor", HIDDEN_STATES, (NUM_TOKENS, hidden_size), torch.float32, dynamic=(0,))
        if self.ranks > 1:
            capture.add_input("tensor", TOKEN_RANKS, (NUM_ALL_TOKENS,), torch.int32, dynamic=(0,))

    def __call__(self, name: str, kind: str = "tensor") -> torch.Tensor:
        return self.values[self.position[kind, name]]

    def intermediate_tensors(self) -> IntermediateTensors | None:
        """What the stage before has passed on; None in the first one."""
        return IntermediateTensors({name: self(RECEIVED + name) for name in self.received}) if self.received else None

    @contextmanager
    def context(self, model: torch.nn.Module) -> Iterator[None]:
        """While active, the model's weights, caches and forward context are these inputs."""
        metadata, slot_mapping, placeholders = {}, {}, {}
        for name, layer in self.layers.items():
            owner = cache_owner(name, self.layers)
            metadata[name] = GraphAttentionMetadata(
                self(owner, "block_table"),
                self("query_start_loc"),
                self("seq_lens"),
                self.vllm_config.cache_config.block_size,
            )
            slot_mapping[name] = self(owner, "slot_mapping")
            placeholders[name], layer.kv_cache = layer.kv_cache, self(owner, "kv_cache")
        tokens = dict(num_tokens=NUM_TOKENS, slot_mapping=slot_mapping)
        if (ranks := self.vllm_config.parallel_config.data_parallel_size) > 1:  # or vLLM asks them, experts or not
            tokens["num_tokens_across_dp"] = [NUM_TOKENS] * ranks
        try:
            with (
                replaced_weights(model, self.tensors, {name: self.values[i] for name, i in self.weights.items()}),
                _no_head_dtype(model),
                set_forward_context(metadata, self.vllm_config, **tokens),
            ):
                if self.ranks > 1:
                    get_forward_context().additional_kwargs[TOKEN_RANKS] = self(TOKEN_RANKS)
                yield
        finally:
            for name, layer in self.layers.items():
                layer.kv_cache = placeholders[name]


def capture_forward(model: torch.nn.Module, vllm_config: VllmConfig) -> CapturedGraph:
    """input_ids [num_tokens] int32, positions [num_tokens] int64, attention inputs, rows [num_rows] int64,
    logits_rows [num_logits] int64 → [num_rows, hidden] float32, [num_logits, vocabulary] float32 and, for each layer
    of experts, [num_experts] float32.

    The first result is the hidden states of the tokens `rows`, the second the logits of its rows `logits_rows`, the
    others how many tokens each expert computes. Data-parallel ranks with experts also get token_ranks
    [tokens of all ranks] int32. A stage of a pipeline that is not the first gets what the one before passes on, one
    that is not the last returns what it passes on for the first two: [num_tokens, width] float32 each.

    Every attention layer gets a slot mapping and a block table of its own; `bind_kv_groups` merges those of one group
    once vLLM has formed its KV cache groups.
    """
    capture = Capture("model")
    inputs = StepInputs(capture, model, vllm_config, facts.tensors_of(model))

    def forward(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs.values = tensors
        with inputs.context(model):
            output = model.forward(
                input_ids=inputs("input_ids"),
                positions=inputs("positions"),
                intermediate_tensors=inputs.intermediate_tensors(),
                inputs_embeds=None,
            )
            counts = [layer.tokens_of_experts for layer in inputs.experts.values()]
            if isinstance(output, IntermediateTensors):
                return *(tensor for _, tensor in sorted(output.items())), *counts
            selected = torch.ops.vllm_ms.embedding(inputs("rows"), output)
            sampled = torch.ops.vllm_ms.embedding(inputs("logits_rows"), selected)
            return selected, model.compute_logits(sampled), *counts

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
    capture, named = Capture("logits"), facts.tensors_of(model)
    weights = capture.add_weights(named)
    row = len(capture.inputs)
    capture.add_input("tensor", "hidden_states", (NUM_TOKENS, hidden_size), torch.float32, dynamic=(0,))

    def compute_logits(tensors: list[torch.Tensor]) -> torch.Tensor:
        values = {name: tensors[i] for name, i in weights.items()}
        with replaced_weights(model, named, values), _no_head_dtype(model):
            return model.compute_logits(tensors[row])

    return capture.trace(compute_logits)
