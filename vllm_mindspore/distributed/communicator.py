"""vLLM's device communicator on groups of ours (`Platform.get_device_communicator_cls`).

Inside a graph the collectives are operators (ops/collectives.py); what vLLM calls outside of one comes here.
"""

import torch
from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase, DeviceCommunicatorBase

from vllm_mindspore.distributed import groups, hosts, joining, watch
from vllm_mindspore.ops.collectives import group_in_graphs


class MindSporeCommunicator(DeviceCommunicatorBase):
    """One of vLLM's groups, which is one of ours too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.device = torch.device("cpu")
        self.name = group_in_graphs(self.unique_name)
        joining.join(self.name, self.cpu_group, spin=hosts.has_own_cpus())
        watch.end_with_other_hosts()
        if self.name == "ep":  # asked for what it can do; tokens are exchanged in graphs, over the group "dp"
            self.all2all_manager = All2AllManagerBase(self.cpu_group)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        return groups.all_reduce(self.name, input_)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return groups.all_gather(self.name, input_, dim % input_.dim(), self.world_size)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return groups.reduce_scatter(self.name, input_, dim % input_.dim(), self.world_size)

    def destroy(self) -> None:
        groups.leave(self.name)
