"""What one rank does in a test of layouts: build the block under its layout, run its tokens, compare bit for bit.

The data are exact: gates of 17 and more make silu the identity in fp32, routing weights have few bits, the rest are
small integers, the shared gate's sigmoid is 1 or 1/2.  So every layout has to give the very bits of one rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.ranked_subject import load
from moe_harness.harness.core.ranked_task import Rank
from moe_harness.harness.ranks.worker import find
from moe_harness.harness.stages.reduction.faults.reductions import fit
from moe_harness.reference import moe_block, router
from moe_harness.reference.experts import experts
from moe_harness.reference.shared_expert_gate import shared_expert_gate

HIDDEN, INNER = 16, 8
_GROUPS: dict[tuple[tuple[int, ...], ...], list[Any]] = {}


# Keys of each family's config that its routing depends on; 8 experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts_per_tok": 3, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts_per_tok": 3, "norm_topk_prob": True},
    "qwen3_next": {"num_experts_per_tok": 4, "norm_topk_prob": True},
    "qwen3_omni_moe_talker_text": {"num_experts_per_tok": 3, "norm_topk_prob": True},
    "mixtral": {"num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 3, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                    "routed_scaling_factor": 2.0},
    "deepseek_v3": {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0},
    # Not among the reference's families: softmax over real and zero-experts, bias for the choice only.
    "longcat_flash": {"num_experts_per_tok": 4, "routed_scaling_factor": 2.0},
}  # fmt: skip
UNGATED = ("deepseek_v2", "deepseek_v3")  # their shared experts have no gate


def split_world(parts: list[list[int]]) -> Any:
    """This rank's group among `parts`; groups are made once per process, by all ranks in the same order."""
    key = tuple(map(tuple, parts))
    if key not in _GROUPS:
        _GROUPS[key] = [dist.new_group(list(part)) for part in parts]
    return next(g for part, g in zip(parts, _GROUPS[key], strict=True) if dist.get_rank() in part)


def integers(shape: tuple[int, ...], low: int, high: int, random: torch.Generator) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=random).double()


def mlp(count: int, small: bool, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up [count, I, H] and down [count, H, I]; `small` keeps every value within bf16's 8 bits."""
    gate, up = torch.zeros(count, INNER, HIDDEN).double(), torch.zeros(count, INNER, HIDDEN).double()
    gate[:, :, 0] = 32 if small else integers((count, INNER), 20, 39, random)  # x[:, 0] is 1
    columns = torch.randint(1, HIDDEN, (count, INNER, 1), generator=random)
    up.scatter_(2, columns, integers((count, INNER, 1), 0, 1, random) * 2 - 1)
    down = integers((count, HIDDEN, INNER), -1, 1, random)
    if small:  # one entry in each row of down
        kept = torch.randint(0, INNER, (count, HIDDEN, 1), generator=random)
        down = torch.zeros_like(down).scatter_(2, kept, 1.0)
    return gate, up, down


def weights_of(spec: dict[str, Any], random: torch.Generator) -> dict[str, Tensor]:
    """Checkpoint names -> tensors in fp64, exact in the dtype of the spec."""
    small = spec["dtype"] == "bf16"
    gate, up, down = mlp(spec["experts"], small, random)
    logits = spec["experts"] + spec.get("zero", 0)
    family = spec.get("family")
    found = {
        "gate.weight": integers((logits, HIDDEN), -2, 2, random),
        "experts.gate_up_proj": torch.cat([gate, up], 1),
        "experts.down_proj": down,
    }
    if spec.get("shared"):
        gate, up, down = (part[0] for part in mlp(1, small, random))
        prefix = "shared_experts" if family in UNGATED else "shared_expert"
        found |= {f"{prefix}.{n}_proj.weight": w for n, w in (("gate", gate), ("up", up), ("down", down))}
        if family not in UNGATED:
            scale = torch.zeros(1, HIDDEN).double()
            scale[0, 7] = 40  # x[:, 7] is 0 or 1, so the sigmoid is 1/2 or 1
            found["shared_expert_gate.weight"] = scale
    if family in ("deepseek_v3", "longcat_flash"):
        found["gate.e_score_correction_bias"] = integers((logits,), -8, 8, random) / 64
    return found


def tokens_of(count: int, random: torch.Generator) -> Tensor:
    x = integers((count, HIDDEN), -2, 2, random)
    x[:, 0] = 1
    x[:, 7] = integers((count,), 0, 1, random)
    return x


def route(gate: Tensor, top_k: int) -> Any:
    """A router with exact logits; ties go to the lower id, weights are powers of two."""

    def routed(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x.cpu().double() @ gate.double().T * 1024 - torch.arange(len(gate))
        ids = logits.topk(min(top_k, len(gate)), dim=-1).indices
        weights = 0.5 ** torch.arange(1, ids.shape[1] + 1).double()
        return weights.expand(ids.shape).float().contiguous().to(x.device), ids.to(x.device)

    return routed


def family_route(family: str, weights: dict[str, Tensor]) -> Any:
    """The family's own routing by the reference, its weights rounded to six bits behind the point: sums stay exact.

    It runs on the CPU and in fp64 wherever the tokens are, so that all ranks and the reference choose alike.
    """
    config = {"model_type": family, **FAMILIES[family]}

    def routed(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = (x.cpu().double() @ weights["gate.weight"].T) / 16 - torch.arange(len(weights["gate.weight"])) / 4096
        if family == "longcat_flash":
            w, ids = router.router(
                logits, top_k=config["num_experts_per_tok"], renormalize=False,
                correction_bias=weights["gate.e_score_correction_bias"],
                routed_scaling_factor=config["routed_scaling_factor"],
            )  # fmt: skip
        else:
            w, ids = moe_block.routing(logits, weights, config)
        return ((w * 64).round() / 64).float().to(x.device), ids.to(x.device)

    return routed


def parts_of(x: Tensor, weights: dict[str, Tensor], routed: Any, num_experts: int) -> tuple[Tensor, Tensor]:
    """Routed part (zero-experts included) and shared part on one rank, by the references.

    In fp32, where silu of these gates is the identity to the bit; in fp64 it is not.
    """
    x, weights = x.float(), {name: tensor.float() for name, tensor in weights.items()}
    w, ids = routed(x)
    real = ids.masked_fill(ids >= num_experts, -1)
    out = experts(x, weights["experts.gate_up_proj"], weights["experts.down_proj"], w, real)
    out += torch.where(ids >= num_experts, w, 0).sum(1, keepdim=True) * x
    prefix = next((p for p in ("shared_expert", "shared_experts") if f"{p}.down_proj.weight" in weights), None)
    if prefix is None:
        return out.double(), torch.zeros_like(out).double()
    shared = moe_block.gated_mlp(x, weights, prefix, "silu")
    if "shared_expert_gate.weight" in weights:
        shared = shared_expert_gate(x, weights["shared_expert_gate.weight"], shared)
    return out.double(), shared.double()


def layout_of(me: Rank, spec: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Keywords of the block's Layout, and which of the token batches this rank holds."""
    world = list(range(me.world_size))
    dispatcher = load("dispatcher", spec["dispatcher"]) if "dispatcher" in spec else None
    owner = torch.tensor(spec["owner"]) if "owner" in spec else None
    common = {"replicas": spec.get("replicas"), "shared_sharded": spec.get("shared") == "sharded"}
    if spec["layout"] == "tp":
        return {"tensor": split_world([world]), **common}, 0
    if spec["layout"] == "sequence":
        return {"tensor": split_world([world]), "sequence_parallel": True, **common}, me.rank
    if spec["layout"] == "ep":
        batch = 0 if getattr(dispatcher, "requires_replicated_tokens", False) else me.rank
        return {"dispatcher": dispatcher, "experts": split_world([world]), "owner": owner, **common}, batch
    half = me.world_size // 2  # tp_ep: neighbours share a batch and shard I, the others share the experts
    pairs = [[2 * i, 2 * i + 1] for i in range(half)]
    across = [[2 * i + j for i in range(half)] for j in range(2)]
    tensor, over = split_world(pairs), split_world(across)
    return {"tensor": tensor, "dispatcher": dispatcher, "experts": over, "owner": owner, **common}, me.rank // 2


def run(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Task: {"equal": every bit as on one rank, "fit": (a, b, residual), "message": the first difference}."""
    random = torch.Generator().manual_seed(seed)
    weights = weights_of(spec, random)
    batches = [tokens_of(count, random) for count in spec["tokens"]]
    dtype = DTYPES[spec["dtype"]]
    block_module = "moe_harness.impls.parallel.moe_block"
    keywords, batch = layout_of(me, spec)
    layout = load("moe_block", f"{block_module}:Layout")(**keywords)
    family = spec.get("family")
    routed = route(weights["gate.weight"], spec["k"]) if family is None else family_route(family, weights)
    given = {name: tensor.to(me.device, dtype) for name, tensor in weights.items() if not name.startswith("gate.")}
    extra = {"reduce": find(spec["reduce"])} if "reduce" in spec else {}
    block = load("moe_block", f"{block_module}:MoEBlock")(given, routed, layout, **extra)
    out = block(batches[batch].to(me.device, dtype)).cpu().double()
    me.recorder.injector.injection = None
    routed_part, shared_part = parts_of(batches[batch], weights, routed, spec["experts"])
    expected = routed_part + shared_part
    wrong = (out != expected).nonzero() if out.shape == expected.shape else torch.zeros(1, 2)
    message = "" if not len(wrong) else f"shape {list(out.shape)}, first difference at {wrong[0].tolist()}"
    return {
        "equal": not len(wrong),
        "message": message,
        "fit": fit(out, routed_part, shared_part) if len(out) else None,
    }
