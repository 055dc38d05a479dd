"""A draft model beside its model: made with it, captured like it, and asked for the tokens that may come next.

Multi-token prediction: a layer that the checkpoint has after the model's own reads the model's hidden state at a token
and the next token, and says the one after (https://arxiv.org/abs/2412.19437, section 2.2). Embedding and output head
are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.base_loader import _has_online_quant, finalize_layerwise_processing
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.dp_utils import coordinate_batch_across_dp

from vllm_mindspore.compiler.pipeline import Compiler
from vllm_mindspore.models import drafts
from vllm_mindspore.ops.sampling import argmax
from vllm_mindspore.worker import facts, mla, model_capture
from vllm_mindspore.worker.draft_step import DraftInputs, DraftStep
from vllm_mindspore.worker.step import token_ranks

PREFIX = "draft."  # of the names of weights that the draft does not share


class DraftProposer(EagleProposer):
    """vLLM's proposer with its model in a compiled graph and without padding: `propose` gets accepted tokens only."""

    step: DraftStep

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner=None):
        super().__init__(vllm_config, device, runner)
        self.hidden_states = self.inputs_embeds = None  # vLLM's buffers, of the largest step and the model's type

    def instantiate(self, target: torch.nn.Module) -> None:
        """Make the draft of `target`, without values; embedding and output head are the target's.

        vLLM shares them after both are loaded; the graph has to know before.
        """
        known = set(model_capture.attention_layers(self.vllm_config))
        with set_default_torch_dtype(self.draft_model_config.dtype), self.device:
            self.model = initialize_model(vllm_config=self.vllm_config, model_config=self.draft_model_config)
        mla.adopt(self.model)
        drafts.complete(self.model)
        self._draft_attn_layer_names = set(model_capture.attention_layers(self.vllm_config)) - known
        self._own = {module: dict(module._modules) for module in self.model.modules()}
        self._share(target)

    def _share(self, target: torch.nn.Module) -> None:
        self._maybe_share_embeddings(target)
        self._maybe_share_lm_head(target)

    @contextmanager
    def _unshared(self, target: torch.nn.Module) -> Iterator[None]:
        """While active, the draft has an embedding and an output head of its own, for vLLM's loader."""
        for module, parts in self._own.items():
            module._modules.clear()
            module._modules.update(parts)
        try:
            yield
        finally:
            self._share(target)

    def load_weights(self, target: torch.nn.Module, read_weights: Callable) -> None:
        """read_weights(model, model_config): reads a checkpoint, as vLLM's loaders do."""
        with self._unshared(target):
            read_weights(self.model, self.draft_model_config)
            if _has_online_quant(self.model):
                finalize_layerwise_processing(self.model, self.draft_model_config)
            process_weights_after_loading(self.model, self.draft_model_config, self.device)
        self._own.clear()

    def tensors(self, target: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The draft's parameters and buffers, each under the one name that it has in all graphs."""
        names = {id(tensor): name for name, tensor in facts.tensors_of(target).items()}
        own = facts.tensors_of(self.model)
        return {names.get(id(tensor), PREFIX + name): tensor for name, tensor in own.items()}

    def set_step(self, compiler: Compiler, weights: dict[str, torch.Tensor], hidden_size: int) -> None:
        """Make the draft's program, on the memory of `weights`. hidden_size: the width of the model's hidden states."""
        self.step = DraftStep(compiler.program("draft", weights), compiler.groups, compiler.compiled_files, hidden_size)

    def facts(self) -> dict[str, object]:
        """What the draft's graph depends on beside the model's facts."""
        return {**facts.of_class(self.model), "hf_config": self.draft_model_config.hf_config.to_dict()}

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        **unused,
    ) -> torch.Tensor:
        """target_token_ids, target_positions: [num_tokens], of accepted tokens and of prompts; target_hidden_states:
        [num_tokens, hidden] float32; next_token_ids: [num_reqs] → [num_reqs, num_speculative_tokens] int64.
        """
        rows = common_attn_metadata.query_start_loc[1:].long() - 1
        input_ids = torch.roll(target_token_ids, -1)
        input_ids[rows] = next_token_ids
        inputs = DraftInputs(
            input_ids,
            target_positions,
            target_hidden_states,
            rows,
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.block_table_tensor[: len(rows)],
            common_attn_metadata.slot_mapping,
            common_attn_metadata.max_seq_len,
        )
        drafted, probabilities = [], []
        for number in range(num_speculative_tokens):
            self._coordinate(inputs, number)
            hidden_states, logits = self.step(inputs)
            tokens, probability = self._sample_from_logits(logits, sampling_metadata)
            drafted.append(tokens)
            probabilities.append(probability)
            if number + 1 < num_speculative_tokens:
                inputs = inputs.following(tokens, hidden_states, self.step.block_size)
        known = probabilities[0] is not None
        self._last_draft_probs = torch.stack(probabilities, dim=1).contiguous() if known else None
        return torch.stack(drafted, dim=1)

    def _sample_from_logits(self, logits, sampling_metadata):
        if not self._enable_probabilistic_draft_probs or sampling_metadata.all_greedy:
            return argmax(logits), None
        return super()._sample_from_logits(logits, sampling_metadata)

    def _coordinate(self, inputs: DraftInputs, number: int) -> None:
        """Tell the data-parallel ranks that share the draft's experts how many tokens its step `number` has here.

        Each of them asks in the same steps, also one without requests: see `dummy_run`. From the second step on there
        is one token a request, as many in all of them.
        """
        if number < 2 and self.step.exchanges_tokens:
            _, num_tokens_across_dp, _ = coordinate_batch_across_dp(
                num_tokens_unpadded=len(inputs.input_ids),
                allow_microbatching=False,
                parallel_config=self.vllm_config.parallel_config,
            )
            inputs.token_ranks = token_ranks(num_tokens_across_dp)

    def dummy_run(self, num_tokens: int, *unused, **also_unused) -> None:
        """As many steps as `propose` has, the first after `num_tokens` prompt tokens, all written to the null block.

        vLLM calls it in steps without requests, and where a request is too close to the maximum length for drafts: the
        other data-parallel ranks need the experts that are here.
        """
        first = self._dummy_inputs(num_tokens)
        later = self._dummy_inputs(first.num_reqs)
        for number, inputs in enumerate([first] + [later] * (self.num_speculative_tokens - 1)):
            self._coordinate(inputs, number)
            self.step(inputs, is_dummy=True)

    def _dummy_inputs(self, num_tokens: int) -> DraftInputs:
        longest = min(self.max_model_len, num_tokens)
        starts = torch.tensor([*range(0, num_tokens, longest), num_tokens], dtype=torch.int32)
        return DraftInputs(
            input_ids=torch.zeros(num_tokens, dtype=torch.int32),
            positions=torch.arange(num_tokens) % longest,
            hidden_states=torch.zeros(num_tokens, self.hidden_size),
            rows=starts[1:].long() - 1,
            query_start_loc=starts,
            seq_lens=torch.diff(starts),
            block_table=torch.zeros(len(starts) - 1, -(-longest // self.step.block_size), dtype=torch.int32),
            slot_mapping=torch.full((num_tokens,), -1),
            max_seq_len=longest,
        )
