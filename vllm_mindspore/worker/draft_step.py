"""One step of a draft model: a compiled graph like the model's, with the model's hidden states as an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_mindspore.compiler.bind import KVGroup
from vllm_mindspore.compiler.capture import GraphInput
from vllm_mindspore.compiler.program import Program
from vllm_mindspore.compiler.tensors import to_mindspore
from vllm_mindspore.models.expert_parallel import TOKEN_RANKS
from vllm_mindspore.worker.model_capture import HIDDEN_STATES
from vllm_mindspore.worker.step import ExpertCounts, GraphStep, used_blocks


@dataclass
class DraftInputs:
    """What a draft reads of a batch: names and types as in vLLM's `CommonAttentionMetadata`.

    input_ids: [num_tokens] int32, of each token the next one; positions: [num_tokens] int64, of the tokens;
    hidden_states: [num_tokens, hidden] float32; rows: [num_reqs] int64, the last token of each request;
    query_start_loc: [num_reqs + 1] int32; seq_lens: [num_reqs] int32; block_table: [num_reqs, max_blocks] int32;
    slot_mapping: [num_tokens] int64; token_ranks: [tokens of all data-parallel ranks] int32, the rank of each, where
    they share the draft's experts.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    hidden_states: torch.Tensor
    rows: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_seq_len: int
    token_ranks: torch.Tensor | None = None

    @property
    def num_reqs(self) -> int:
        return len(self.seq_lens)

    def following(self, tokens: torch.Tensor, hidden_states: torch.Tensor, block_size: int) -> DraftInputs:
        """One token a request, after `tokens` [num_reqs] were drafted; hidden_states: [num_reqs, hidden]."""
        positions = self.positions[self.rows] + 1
        requests = torch.arange(self.num_reqs)
        blocks = self.block_table[requests, positions // block_size]
        return DraftInputs(
            input_ids=tokens.int(),
            positions=positions,
            hidden_states=hidden_states,
            rows=requests,
            query_start_loc=torch.arange(self.num_reqs + 1, dtype=torch.int32),
            seq_lens=self.seq_lens + 1,
            block_table=self.block_table,
            slot_mapping=blocks.long() * block_size + positions % block_size,
            max_seq_len=self.max_seq_len + 1,
            token_ranks=self.token_ranks,
        )


class DraftStep(GraphStep):
    """Runs the draft's graph. All its layers are in one KV cache group."""

    def __init__(self, program: Program, groups: list[KVGroup], cached_files: Callable[[], object | None], hidden: int):
        """hidden: the width of the model's hidden states."""
        super().__init__(program, groups, cached_files, {HIDDEN_STATES: hidden})
        self.counts = ExpertCounts(program.emitted)
        self.exchanges_tokens = any(item.name == TOKEN_RANKS for item in program.emitted.inputs)
        (number,) = {int(item.name) for item in program.emitted.inputs if item.kind == "block_table"}
        self.block_size = groups[number].block_size

    def __call__(self, inputs: DraftInputs, is_dummy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_reqs, hidden] and logits [num_reqs, vocabulary], float32, of the last token of each request."""
        values = [self._input(item, inputs) for item in self.program.emitted.inputs]
        hidden_states, logits, counts = self._results(self.program(values), *[inputs.num_reqs] * 2)
        if not is_dummy:
            self.counts.add(counts)
        return hidden_states, logits

    def _input(self, item: GraphInput, inputs: DraftInputs):
        if item.kind == "kv_cache":
            return self.kv_caches[item.name]
        if item.kind == "block_table":
            return used_blocks(inputs.block_table, inputs, self.block_size)
        return to_mindspore(getattr(inputs, item.kind if item.kind == "slot_mapping" else item.name))
