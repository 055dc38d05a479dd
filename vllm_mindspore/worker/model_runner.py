"""Model runner: vLLM's in-tree CPU runner with the model executed by MindSpore.

Batch state, sampling, logprobs, structured output and prompt logprobs are vLLM's. Overridden here: loading (the graphs
are captured before the weights are read), the KV cache's second view, and the two calls that run the model.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_mindspore import compat
from vllm_mindspore.compiler.pipeline import Compiler
from vllm_mindspore.ops import registry
from vllm_mindspore.quantization import dequantize
from vllm_mindspore.worker import facts, huge_pages, kv_groups, layers, mla, model_capture, sampling
from vllm_mindspore.worker.step import ModelStep

if TYPE_CHECKING:
    from vllm_mindspore.worker.draft import DraftProposer

logger = init_logger("vllm.vllm_mindspore.model_runner")


class MindSporeModelRunner(CPUModelRunner):
    """One model on one device."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        # The runner is synchronous (a host has no device streams); the scheduler above it may still be asynchronous.
        scheduler = vllm_config.scheduler_config
        asynchronous, scheduler.async_scheduling = scheduler.async_scheduling, False
        try:
            super().__init__(vllm_config, device)
        finally:
            scheduler.async_scheduling = asynchronous
        sampling.use_kernels(self.sampler)
        self.draft: DraftProposer | None = None
        if self.speculative_config is not None:
            self._prepare_drafts()
        self.compile_seconds = 0.0
        self.population: huge_pages.Population | None = None

    def _prepare_drafts(self) -> None:
        from vllm_mindspore.worker.draft import DraftProposer
        from vllm_mindspore.worker.rejection import MatchingSampler

        self.rejection_sampler = MatchingSampler(self.sampler, self.speculative_config, self.device)
        if self.speculative_config.use_eagle():
            self.drafter = self.draft = DraftProposer(self.vllm_config, self.device, self)

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Instantiate vLLM's model, capture and lower its graphs, and only then read the weights.

        Raises:
            UnmappedOperatorError, CaptureError: the model cannot run here; before any weight is read.
        """
        registry.define_all()
        layers.register()
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        loader = get_model_loader(self.load_config)
        dequantize.adopt(loader, self.vllm_config)
        read_weights = loader.load_weights

        def load_weights(model, model_config) -> None:
            self._prepare_graphs(model)
            huge_pages.request(self._tensors(model).values())
            with self.compiler.building():
                read_weights(model, model_config)
                if self.draft is not None:
                    self.draft.load_weights(model, read_weights)

        loader.load_weights = load_weights
        begin = time.perf_counter()
        self.model = loader.load_model(vllm_config=self.vllm_config, model_config=self.model_config)
        logger.info(
            "model loaded in %.1f s (%.1f s of it capture and lowering)",
            time.perf_counter() - begin,
            self.compile_seconds,
        )

    def _tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """All parameters and buffers by the names that they have in graphs: the model's, then the draft's others."""
        tensors = facts.tensors_of(model)
        return tensors if self.draft is None else {**tensors, **self.draft.tensors(model)}

    def _prepare_graphs(self, model: torch.nn.Module) -> None:
        begin = time.perf_counter()
        mla.adopt(model)
        known = facts.of_model(model, self.vllm_config)
        if self.draft is not None:
            self.draft.instantiate(model)
            known["draft"] = self.draft.facts()
        self.kv_groups = kv_groups.of_model(self.vllm_config)
        self.compiler = Compiler(
            known,
            facts.weights_of(self._tensors(model)),
            kv_groups.for_graphs(self.kv_groups),
            device="cpu",
            eager=self.model_config.enforce_eager,
        )
        with self.compiler.building():
            if not self.compiler.open():
                self._capture(model)
        self.compile_seconds += time.perf_counter() - begin

    def _capture(self, model: torch.nn.Module) -> None:
        started = time.perf_counter()
        draft = None if self.draft is None else (self.draft.model, self.draft.tensors(model))
        for captured in model_capture.capture_model(model, self.vllm_config, draft):
            logger.info("graph %s captured in %.1f s", captured.name, time.perf_counter() - started)
            self.compiler.add(captured, self.model_config.architecture)
            started = time.perf_counter()

    def compile_and_profile(self) -> None:
        """Compile both graphs and run the largest step on a KV cache of a few blocks.

        Afterwards the activations' memory is resident, so what is free can be given to the KV cache.
        """
        begin = time.perf_counter()
        with self.compiler.building():
            self._compile_and_profile()
        self.compile_seconds += time.perf_counter() - begin
        logger.info("graphs ready and %d tokens run in %.1f s", self.max_num_tokens, time.perf_counter() - begin)

    def _compile_and_profile(self) -> None:
        weights = self._tensors(self.model)
        self.compiler.arrange(weights)
        self._keep_loading(weights)
        pipeline = get_pp_group()
        self.step = ModelStep(
            self.compiler.program("model", weights),
            self.compiler.program("logits", weights) if pipeline.is_last_rank else None,
            self.compiler.groups,
            self.compiler.compiled_files,
            model_capture.tensors_between_stages(self.model) if pipeline.world_size > 1 else None,
        )
        if self.draft is not None:
            hidden_size = self.step.model.emitted.outputs[0][1]
            self.draft.set_step(self.compiler, weights, hidden_size)
        if not pipeline.is_first_rank:  # vLLM would make them of the weights' type
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=torch.float32, device=self.device
            )
        self.model.forward = self.step.forward
        self.model.compute_logits = self.step.compute_logits
        self._initialize_small_kv_cache()
        with self.compiler.mindspore_cache():
            self._run_dummy_step(self.max_num_tokens)
        self.compiler.close()
        self._cleanup_profiling_kv_cache()

    def _keep_loading(self, weights: dict[str, torch.Tensor]) -> None:
        """Let new weights be loaded into the running model, by `LLM.apply_model`."""
        load_weights = self.model.load_weights

        def load_in_rows(*args, **kwargs):
            with self.compiler.in_rows(weights):
                return load_weights(*args, **kwargs)

        self.model.load_weights = load_in_rows

    def _initialize_small_kv_cache(self) -> None:
        config = compat.kv_cache_config(self.vllm_config, self.kv_groups, num_blocks=2)
        self.initialize_kv_cache(config, is_profiling=True)

    def initialize_kv_cache_tensors(self, kv_cache_config, kernel_block_sizes, kv_cache_allocation_context=None):
        with huge_pages.ReservedZeros():
            caches = super().initialize_kv_cache_tensors(
                kv_cache_config, kernel_block_sizes, kv_cache_allocation_context
            )
        groups = kv_groups.for_graphs(kv_cache_config.kv_cache_groups, kernel_block_sizes)
        if [set(g.layers) for g in groups] != [set(g.layers) for g in self.compiler.groups] or any(
            a.block_size != b.block_size for a, b in zip(groups, self.compiler.groups, strict=True)
        ):
            raise RuntimeError(
                f"the engine's KV cache groups {groups} differ from those the graphs were compiled for, "
                f"{self.compiler.groups}"
            )
        self.step.bind_kv_caches(caches)
        if self.draft is not None:
            self.draft.step.bind_kv_caches(caches)
        return caches

    def _prepare_inputs(self, *args, **kwargs):
        prepared = super()._prepare_inputs(*args, **kwargs)
        logits_indices = prepared[0]
        every_row = bool(self.num_prompt_logprobs) or self.draft is not None
        self.step.expect(logits_indices.long(), every_row)
        return prepared

    def sample_tokens(self, grammar_output):
        thrown_away = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        with sampling.set_aside(self.input_batch.generators, thrown_away):
            return super().sample_tokens(grammar_output)

    def _copy_draft_token_ids_to_cpu(self, scheduler_output, zeros_only: bool = False) -> None:
        """Drafts are on the host already. Near the maximum length there are none, rather than zeros."""
        requests = self.input_batch.req_ids.copy()
        if zeros_only:
            self._draft_token_ids = [[] for _ in requests]
        elif isinstance(self._draft_token_ids, torch.Tensor):
            self._draft_token_ids = self._draft_token_ids.tolist()
        self._draft_token_req_ids = requests

    def kv_cache_bytes_of_one_request(self) -> int:
        """Bytes of KV cache that one request of the maximum length needs."""
        return sum(spec.max_memory_usage_bytes(self.vllm_config) for spec in self.get_kv_cache_spec().values())

    def warm_up(self) -> None:
        """One small step on the real KV cache: nothing is compiled any more. The cache becomes resident meanwhile."""
        self.population = huge_pages.Population(self.kv_caches)
        self._run_dummy_step(min(self.max_num_tokens, 16))

    def _run_dummy_step(self, num_tokens: int) -> None:
        """A step of up to `num_tokens` prompt tokens over all requests, with attention and sampling."""
        num_reqs = self.scheduler_config.max_num_seqs
        num_tokens = min(num_tokens, num_reqs * self.model_config.max_model_len)
        longest_query = num_tokens - (num_reqs - 1) * (num_tokens // num_reqs) if num_tokens > num_reqs else 1
        _, last = self._dummy_run(num_tokens, force_attention=True, profile_seq_lens=longest_query)
        if get_pp_group().is_last_rank:
            self._dummy_sampler_run(last)

    def tokens_of_experts(self) -> dict[str, list[int]]:
        """By layer of experts: how many tokens each expert has computed."""
        parts = [(self.model, self.step.counts)]
        if self.draft is not None:
            parts.append((self.draft.model, self.draft.step.counts))
        return {
            layer: tokens
            for model, counts in parts
            for layer, tokens in zip(model_capture.expert_layers(self.vllm_config, model), counts.tolist(), strict=True)
        }

    def graph_statistics(self) -> dict[str, object]:
        """Counts per graph: compiles, loads, calls; passes' matches; operators; weights shared without a copy."""
        programs = {"model": self.step.model, "logits": self.step.logits}
        if self.draft is not None:
            programs["draft"] = self.draft.step.program
        return {
            name: {
                **vars(program.counters),
                "passes": self.compiler.graphs[name].passes,
                "operators": program.emitted.operators,
                "layer_classes": program.emitted.layer_classes,
                "source": str(program.path),
                "weights": len(program.shared),
                "weights_shared": sum(program.shared.values()),
                "weights_in_columns": len(program.columns),
                "weights_coded": sum(program.columns.values()),
            }
            for name, program in programs.items()
            if program is not None
        }

    def _init_kv_zero_meta(self) -> None:
        """`_zero_block_ids` of the CPU runner zeroes through torch views; no kernel metadata is needed."""

    def shutdown(self) -> None:
        """Release weights, KV caches and graphs."""
        if self.population is not None:
            self.population.stop()
        self.step = self.population = None
        super().shutdown()
