"""The symmetric dispatcher on the CPU: its kernels interpreted, the memory of all ranks one shared file."""

import os
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined; workers that import this run nothing else

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers import _put, symmetric
from moe_harness.impls.dispatchers.symmetric import Symmetric as _Symmetric
from moe_harness.impls.dispatchers.symmetric import Workspace

_put.PROGRAMS = 3
_put.TILE = 16
symmetric.MAX_TOKENS = 4  # so that some cases fall back


class Symmetric(_Symmetric):
    """Registered under no name: what differs is where the ranks' memory comes from."""

    def _require(self) -> None:
        """Nothing is missing here."""

    def _mapped(self, size: int, device: torch.device) -> Workspace:
        size = min(size, 1 << 20)
        path = [f"{tempfile.mkdtemp()}/memory"]
        dist.broadcast_object_list(path, src=dist.get_global_rank(self.group, 0), group=self.group)
        if self.rank == 0:
            Path(path[0]).write_bytes(bytes(size * self.world_size))
        dist.barrier(self.group)
        whole = torch.UntypedStorage.from_file(path[0], True, size * self.world_size)
        buffers: Tensor = torch.empty(0, dtype=torch.uint8).set_(whole).view(self.world_size, size)
        peers = torch.tensor([buffers[q].data_ptr() for q in range(self.world_size)])
        return Workspace(buffers[self.rank], peers, torch.zeros(self.kernels.PROGRAMS, dtype=torch.int64), whole)


class Bounded(Symmetric):
    """With a bound, as for graphs."""

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor):
        super().__init__(group, num_experts=num_experts, owner=owner, max_tokens=17)
