"""One step of the model: vLLM's inputs of a batch → a compiled graph → torch tensors, nothing copied."""

from collections.abc import Callable

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from vllm_mindspore.compiler.bind import KVGroup
from vllm_mindspore.compiler.capture import GraphInput
from vllm_mindspore.compiler.emit import EmittedGraph
from vllm_mindspore.compiler.program import Program
from vllm_mindspore.compiler.tensors import array_to_mindspore, to_mindspore, to_torch, unpack
from vllm_mindspore.models.expert_parallel import TOKEN_RANKS
from vllm_mindspore.worker.model_capture import RECEIVED


class GraphStep:
    """A compiled graph, its KV caches and the inputs of a step."""

    def __init__(
        self,
        program: Program,
        groups: list[KVGroup],
        cached_files: Callable[[], object | None],
        widths: dict[str, int] | None = None,
    ):
        """groups: the KV cache groups in vLLM's order. widths: of inputs that are rows of hidden states, by name."""
        self.program, self.groups, self._cached_files, self._widths = program, groups, cached_files, widths or {}
        self.kv_caches: dict[str, object] = {}

    def bind_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's caches, [blocks, heads, block_size, row] views of [blocks, block_size, heads, row] memory.

        MindSpore sees each as [slots, heads, row]: the same memory.
        """
        self.kv_caches = {}
        for name, cache in kv_caches.items():
            rows = cache.permute(0, 2, 1, 3)
            if not rows.is_contiguous():
                raise ValueError(
                    f"KV cache of layer {name}: shape {tuple(cache.shape)}, stride {cache.stride()} is not LBNHC "
                    "in one piece"
                )
            self.kv_caches[name] = to_mindspore(rows.view(-1, *rows.shape[2:]))
        if self.program.counters.calls == 0:
            types = {name: cache.dtype for name, cache in kv_caches.items()}
            self.program.compile(
                [self._input_signature(item, types) for item in self.program.emitted.inputs], self._cached_files
            )

    def _input_signature(self, item: GraphInput, types: dict[str, torch.dtype]):
        if item.kind == "kv_cache":
            return (None, *self.kv_caches[item.name].shape[1:]), types[item.name]
        if item.kind == "block_table":
            return (None, None), torch.int32
        if item.kind == "slot_mapping" or item.name in ("positions", "rows", "logits_rows"):
            return (None,), torch.int64
        if item.name in self._widths:
            return (None, self._widths[item.name]), torch.float32
        return (None,), torch.int32

    def _results(self, results, *num_rows: int) -> list:
        """What the graph returned, as torch tensors: the first ones of so many rows each, then a list of the others."""
        if self.program.emitted.packed:
            shapes = list(self.program.emitted.outputs)
            shapes[: len(num_rows)] = [(rows, *sizes) for rows, (_, *sizes) in zip(num_rows, shapes, strict=False)]
            tensors = unpack(to_torch(results), shapes)
        elif isinstance(results, tuple):
            # the last is ready last: who waits for an earlier one first keeps a CPU busy until then
            tensors = [to_torch(result) for result in reversed(results)][::-1]
        else:
            tensors = [to_torch(results)]
        return [*tensors[: len(num_rows)], tensors[len(num_rows) :]]


class ExpertCounts:
    """How many tokens each expert of a graph has computed: its results after the first two."""

    def __init__(self, emitted: EmittedGraph):
        self._sizes = [shape[0] for shape in emitted.outputs if len(shape) == 1]  # of each layer
        self._sum = torch.zeros(sum(self._sizes), dtype=torch.float64)  # of all layers: exact, one sum

    def add(self, counts: list[torch.Tensor]) -> None:
        """counts: of one step, of each layer of experts."""
        if counts:
            self._sum += torch.cat(counts)

    def tolist(self) -> list[list[int]]:
        """By layer."""
        return [layer.long().tolist() for layer in self._sum.split(self._sizes)] if self._sizes else []


class ModelStep(GraphStep):
    """Stands in for the model's `forward` and `compute_logits`.

    The runner says with `expect` which rows it will ask the logits of: `forward` computes them in the same graph, and
    `compute_logits` hands them out. Other hidden states go through the second graph, which has only the output head.
    KV caches are graph inputs of any size, so a cache of another size needs no other graph.
    """

    def __init__(
        self,
        model: Program,
        logits: Program | None,
        groups: list[KVGroup],
        cached_files: Callable[[], object | None],
        between_stages: dict[str, int] | None = None,
    ):
        """groups: the KV cache groups in vLLM's order; any layer of a group carries the group's metadata.

        logits: None in a stage of a pipeline that is not the last. between_stages: names and widths of what stages
        pass on.
        """
        self.between_stages = between_stages or {}
        received = {RECEIVED + name: width for name, width in self.between_stages.items()}
        super().__init__(model, groups, cached_files, received)
        self.model, self.logits = model, logits
        self._expected: torch.Tensor | None = None
        self._every_row = False
        self._computed: tuple[torch.Tensor, torch.Tensor] | None = None
        self._arange = torch.arange(0)
        self.counts = ExpertCounts(model.emitted)
        if logits is not None:
            logits.compile([(model.emitted.outputs[0], torch.float32)], cached_files)

    def expect(self, logits_indices: torch.Tensor, every_row: bool) -> None:
        """For the next `forward`: [num_logits] int64, the tokens whose logits are needed.

        every_row: the hidden states of all tokens are needed too, not only of these.
        """
        self._expected, self._every_row = logits_indices, every_row

    def forward(
        self, input_ids, positions, intermediate_tensors: IntermediateTensors | None = None, inputs_embeds=None
    ) -> torch.Tensor | IntermediateTensors:
        """input_ids [num_tokens] int32, positions [num_tokens] int64 → hidden states [num_tokens, hidden] float32.

        They are zero for tokens that `expect` did not name; without an `expect`, for all but the last. In a pipeline
        stage that is not the last: what it passes on.
        """
        context = get_forward_context()
        metadata = context.attn_metadata
        if not isinstance(metadata, dict):
            raise RuntimeError("the model was called without attention metadata: nothing of this backend does that")
        common = next(iter(metadata.values()))
        num_tokens = len(input_ids)
        is_dummy = self._expected is None
        rows, logits_rows = self._rows(num_tokens)
        values = {
            "input_ids": input_ids,
            "positions": positions,
            "query_start_loc": common.query_start_loc,
            "seq_lens": common.seq_lens,
            "rows": rows,
            "logits_rows": logits_rows,
        }
        if context.dp_metadata is not None:
            values[TOKEN_RANKS] = token_ranks(context.dp_metadata.num_tokens_across_dp_cpu)
        if intermediate_tensors is not None:
            values.update({RECEIVED + name: tensor for name, tensor in intermediate_tensors.items()})
        inputs = [
            self._input(item, values, metadata, context.slot_mapping, common) for item in self.model.emitted.inputs
        ]
        results = self.model(inputs)
        if self.logits is None:
            *passed_on, counts = self._results(results, *[num_tokens] * len(self.between_stages))
            self._count(counts, is_dummy)
            return IntermediateTensors(dict(zip(self.between_stages, passed_on, strict=True)))
        selected, logits, counts = self._results(results, len(rows), len(logits_rows))
        self._count(counts, is_dummy)
        self._computed = (selected[logits_rows], logits) if len(rows) > len(logits_rows) else (selected, logits)
        if len(rows) == num_tokens:
            return selected
        hidden_states = torch.zeros(num_tokens, selected.shape[1])
        hidden_states[rows] = selected
        return hidden_states

    def _count(self, counts: list[torch.Tensor], is_dummy: bool) -> None:
        """Add what the experts have computed, unless it was for no request."""
        if not is_dummy:
            self.counts.add(counts)

    def _rows(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens whose hidden states are computed, rows of these whose logits are)."""
        if len(self._arange) < num_tokens:
            self._arange = torch.arange(num_tokens)
        expected, self._expected = self._expected, None
        if expected is None:
            return self._arange[num_tokens - 1 : num_tokens], self._arange[:1]
        if self._every_row:
            return self._arange[:num_tokens], expected
        return expected, self._arange[: len(expected)]

    def _input(self, item: GraphInput, values, metadata, slots, common):
        if item.kind == "kv_cache":
            return self.kv_caches[item.name]
        if item.kind == "tensor":
            return to_mindspore(values[item.name])
        group = self.groups[int(item.name)]
        if item.kind == "slot_mapping":
            return to_mindspore(slots[group.layers[0]])
        return used_blocks(metadata[group.layers[0]].block_table_tensor, common, group.block_size)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden] float32 → [num_rows, vocabulary] float32."""
        computed, self._computed = self._computed, None
        if computed is not None and torch.equal(computed[0], hidden_states):
            return computed[1]
        return to_torch(self.logits([to_mindspore(hidden_states.contiguous())]))


def token_ranks(num_tokens: torch.Tensor) -> torch.Tensor:
    """num_tokens [ranks] int32 → the rank of each token of all ranks, in order: int32."""
    return torch.repeat_interleave(torch.arange(len(num_tokens), dtype=torch.int32), num_tokens)


def used_blocks(block_table: torch.Tensor, common, block_size: int):
    """The columns of the block table that this step's longest context uses, contiguous."""
    blocks = max(-(-common.max_seq_len // block_size), 1)
    return array_to_mindspore(np.ascontiguousarray(block_table[: common.num_reqs, :blocks].numpy()))
