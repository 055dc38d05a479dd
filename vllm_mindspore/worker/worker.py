"""vLLM's V1 worker on MindSpore: the first place in a process where MindSpore is imported."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    ensure_model_parallel_initialized,
    get_pp_group,
    get_tp_group,
    get_world_group,
    init_distributed_environment,
)
from vllm.logger import init_logger
from vllm.sequence import IntermediateTensors
from vllm.utils.mem_utils import format_gib
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from vllm_mindspore.distributed import groups, hosts, world
from vllm_mindspore.worker import memory

logger = init_logger("vllm.vllm_mindspore.worker")


class MindSporeWorker(WorkerBase):
    """One process, one device. Order of calls: init_device, load_model, get_kv_cache_spec, determine_available_memory,
    initialize_from_config, compile_or_warm_up_model, then steps."""

    _sending: tuple[IntermediateTensors, list] | None = None  # what goes to the next pipeline stage

    def init_device(self) -> None:
        if self.parallel_config.world_size_across_dp > 1:
            groups.step_timeout()  # refuses what is no time before a model loads
        self._init_world()
        if self.place.ranks > 1:
            hosts.take_share_of_cpus(self.place.index, self.place.ranks)
        begin = time.perf_counter()
        import mindspore

        if mindspore.get_context("device_target") != "CPU":  # cannot be set again once anything has run
            mindspore.set_device("CPU")
        logger.info("MindSpore %s imported in %.1f s", mindspore.__version__, time.perf_counter() - begin)
        self.device = torch.device("cpu")
        torch.set_num_threads(1)  # torch's OpenMP team would spin against the operators' threads
        ensure_model_parallel_initialized(
            self.parallel_config.tensor_parallel_size, self.parallel_config.pipeline_parallel_size
        )
        self._forget_rendezvous()
        set_random_seed(self.model_config.seed)
        from vllm_mindspore.worker.model_runner import MindSporeModelRunner

        self.model_runner = MindSporeModelRunner(self.vllm_config, self.device)

    def _init_world(self) -> None:
        """Find the other ranks, and which of them are on this host."""
        config = self.parallel_config
        if config.world_size_across_dp == 1 and not torch.distributed.is_initialized():
            # By default the group's store would be a file in /tmp that nobody deletes.
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), world_size=1, rank=0)
        rendezvous = urlsplit(self.distributed_init_method).hostname  # Ray's; none where it is a file
        master = config.master_addr if config.nnodes > 1 else config.data_parallel_master_ip
        hosts.note_master(rendezvous or master)
        store = world.require_same_sizes(config, self.rank)
        init_distributed_environment(
            config.world_size, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        del store  # torch has its own by now
        world.require_same_model(self.vllm_config, get_world_group().cpu_group)
        self.place = hosts.find_place(self.vllm_config, get_world_group().cpu_group)

    def _forget_rendezvous(self) -> None:
        """Delete the file through which the ranks have found each other: nobody else would, had one been killed."""
        path = self.distributed_init_method.removeprefix("file://")
        if path != self.distributed_init_method and self.parallel_config.world_size_across_dp > 1:
            torch.distributed.barrier()
            Path(path).unlink(missing_ok=True)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """While this rank runs what the others run too: it tells them when it fails, and says why they did.

        Raises:
            GroupError: another rank died, stalled or failed.
        """
        try:
            yield
        except Exception as error:
            if self.parallel_config.world_size_across_dp == 1:
                raise
            groups.fail(f"{type(error).__name__}: {error}")
            if reason := groups.failure():
                raise groups.GroupError(reason) from error
            raise

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        gc.freeze()  # what is imported: vLLM collects garbage while it loads, half a second each time; it thaws later
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.load_model(load_dummy_weights)

    def get_model(self) -> torch.nn.Module:
        return self.model_runner.get_model()

    def get_kv_cache_spec(self):
        return self.model_runner.get_kv_cache_spec()

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, after the graphs are compiled and the largest step has run once."""
        with set_current_vllm_config(self.vllm_config), self._together():
            self.model_runner.compile_and_profile()
        one = self.model_runner.kv_cache_bytes_of_one_request()
        most = one * (self.scheduler_config.max_num_seqs + 1)
        size = memory.kv_cache_bytes(self.cache_config, one, most, self.place.ranks)
        logger.info(
            "KV cache: %s GiB; resident so far %s GiB, free %s GiB of %s GiB",
            *(
                format_gib(n)
                for n in (size, memory.resident_memory(), memory.available_memory(), memory.total_memory())
            ),
        )
        return size

    def initialize_from_config(self, kv_cache_config) -> None:
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.initialize_kv_cache(kv_cache_config)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len
        self.model_runner.update_max_model_len(max_model_len)

    @torch.inference_mode()
    def compile_or_warm_up_model(self) -> CompilationTimes:
        begin = time.perf_counter()
        with set_current_vllm_config(self.vllm_config), self._together():
            self.model_runner.warm_up()
        if self.parallel_config.world_size_across_dp > 1:
            groups.use_step_timeout()
        set_random_seed(self.model_config.seed)
        return CompilationTimes(
            language_model=self.model_runner.compile_seconds + time.perf_counter() - begin, encoder=0.0
        )

    @torch.inference_mode()
    def execute_model(self, scheduler_output):
        with self._together():
            self._wait_until_sent()
            received = None
            if scheduler_output.total_num_scheduled_tokens > 0 and not get_pp_group().is_first_rank:
                received = IntermediateTensors(get_pp_group().recv_tensor_dict(all_gather_group=get_tp_group()))
            output = self.model_runner.execute_model(scheduler_output, received)
            if not isinstance(output, IntermediateTensors):
                return output
            self._sending = output, get_pp_group().isend_tensor_dict(output.tensors, all_gather_group=get_tp_group())
            return None

    def _wait_until_sent(self) -> None:
        """For the step before this one, whose tensors live until then."""
        _, handles = self._sending or (None, [])
        for handle in handles:
            handle.wait()
        self._sending = None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output):
        with self._together():
            return self.model_runner.sample_tokens(grammar_output)

    @torch.inference_mode()
    def execute_dummy_batch(self) -> None:
        """A step without requests, beside data-parallel ranks that have some: it takes part in their exchanges."""
        with self._together():
            self.model_runner._dummy_run(1, force_attention=True)

    def take_draft_token_ids(self):
        return self.model_runner.take_draft_token_ids()

    def get_supported_tasks(self):
        return self.model_runner.get_supported_tasks()

    def get_encoder_timing_stats(self) -> dict[str, dict[str, float | int]]:
        return self.model_runner.get_encoder_timing_stats()

    def graph_statistics(self) -> dict[str, object]:
        """Counts of this process's graphs (compiles, loads, calls, matches), for `LLM.collective_rpc`."""
        return self.model_runner.graph_statistics()

    def tokens_of_experts(self) -> dict[str, list[int]]:
        """How many tokens of this rank each expert has computed since the start, by layer."""
        return self.model_runner.tokens_of_experts()

    def synchronize_device(self) -> None:
        import mindspore

        mindspore.runtime.synchronize()

    def list_loras(self) -> set[int]:
        return set()

    def shutdown(self) -> None:
        if self.model_runner is not None:
            self.model_runner.shutdown()
