"""transformers' own expert parallelism around one sparse block: what a layer of a model loaded with
`DistributedConfig(tp_size=R, enable_expert_parallel=True)` runs.

Every rank holds the same tokens and E / R of the experts; the router's output is masked to the own experts, and one
all_reduce sums the ranks' parts.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


class ExpertParallel:
    """A block of Qwen3-MoE over the ranks of a group.

    Args:
        weights: the whole block's, by checkpoint name: gate.weight, experts.gate_up_proj, experts.down_proj.
        top_k: experts per token; their weights are renormalised.
        experts_implementation: "grouped_mm" or "batched_mm"; the eager path of 5.17 fails on masked slots.

    Raises:
        ValueError: from transformers, where the number of ranks does not divide that of experts.
    """

    def __init__(
        self, group: dist.ProcessGroup, weights: dict[str, Tensor], *, top_k: int, experts_implementation: str
    ):
        from transformers import Qwen3MoeConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        experts, hidden, inner = weights["experts.down_proj"].shape
        config = Qwen3MoeConfig(
            hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=top_k,
            norm_topk_prob=True, num_hidden_layers=1, experts_implementation=experts_implementation,  # type: ignore[call-arg]
        )  # fmt: skip
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config).eval().requires_grad_(False)
        block.load_state_dict(weights, assign=True, strict=True)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": block})])})
        model.config = SimpleNamespace()  # type: ignore[assignment]
        model.tp_plan = config.base_model_ep_plan  # type: ignore[assignment]
        kind = weights["gate.weight"].device.type
        mesh = DeviceMesh.from_group(group, kind, mesh_dim_names=("tp",))
        apply_tensor_parallelism(model, mesh)
        self.block = block

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [T, H], the same on every rank -> [T, H], the same on every rank."""
        with torch.no_grad():
            return self.block(hidden_states[None])[0]
