"""Faults of the experts stage that first kernels have: another activation, ids off by one, weights misread, lost tiles.

None is a published bug; each was written by somebody in the first version of a kernel, and is told in words that lead
to the line.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, locate, run, select

# Sum over slots -------------------------------------------------------------------------------------------------


@fault("weighting", condition="k > 1", hidden=("k=1",))
def slots_averaged(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The weighted outputs of a token are averaged, not added: the result is the k-th part of the right one."""

    def mean(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return steps.combine(slots, topk_weights, ids) / ids.shape[1]

    return run(*call, **options, steps=steps, combine=mean)


# Activation -----------------------------------------------------------------------------------------------------


@fault("activation", condition="activation='silu'", hidden=("activation=gelu_tanh",))
def gelu_erf_for_silu(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """SiLU is computed as the exact GELU (erf): the default of a library's `gelu`."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return F.gelu(gate) * up if activation == "silu" else steps.gated(gate, up, activation)

    return run(*call, **options, steps=steps, glu=glu)


@fault("activation")
def relu_for_activation(*call: Tensor, **options: Any) -> Tensor:
    """The activation is ReLU, whatever is asked for."""
    return run(*call, **options, glu=lambda gate, up, _: F.relu(gate) * up)


@fault("activation")
def sigmoid_for_activation(*call: Tensor, **options: Any) -> Tensor:
    """The gate is its sigmoid alone, where SiLU is g * sigmoid(g)."""
    return run(*call, **options, glu=lambda gate, up, _: torch.sigmoid(gate) * up)


@fault("activation")
def activation_on_both_halves(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The activation is applied to gate and up, as in a plain MLP, and then multiplied."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        one = torch.ones_like(up)
        return steps.gated(gate, one, activation) * steps.gated(up, one, activation)

    return run(*call, **options, steps=steps, glu=glu)


@fault("activation", condition="always; without an effect where the activation ignores its argument's sign")
def activation_after_product(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """act(g * u) is computed instead of act(g) * u."""
    return run(
        *call, **options, steps=steps, glu=lambda gate, up, kind: steps.gated(gate * up, torch.ones_like(up), kind)
    )


# Weights --------------------------------------------------------------------------------------------------------


@fault("layout", condition="H > 1 and I > 1", hidden=("I=1",))
def down_proj_read_as_i_by_h(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """down_proj [E, H, I] is read flat as [E, I, H]: it is indexed with the strides of its transpose."""
    return run(*call, **options, steps=steps, second=lambda rows, weight: steps.matmul(rows, _flat(weight)))


@fault("layout", condition="H > 1", hidden=("H=1",))
def gate_up_proj_read_as_h_by_2i(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """gate_up_proj [E, 2I, H] is read flat as [E, H, 2I]: it is indexed with the strides of its transpose."""
    return run(*call, **options, steps=steps, first=lambda rows, weight: steps.matmul(rows, _flat(weight)))


def _flat(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[1], weight.shape[0]).T


# Ids ------------------------------------------------------------------------------------------------------------


def _moved(by: int, num_experts: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    def moved(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map)
        return torch.where(ids < 0, -1, (ids + by) % num_experts)

    return moved


@fault("ids", condition="E > 1", hidden=("E=1,k=1",))
def expert_id_one_too_high(hidden: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Every id runs the next expert, the last one the first: offsets of the experts are read one place late."""
    return run(hidden, gate_up, *call, **options, locate=_moved(1, len(gate_up)))


@fault("ids", condition="E > 2", hidden=("E=1,k=1",))
def expert_id_one_too_low(hidden: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Every id runs the expert before, the first one the last: ids are taken to count from 1."""
    return run(hidden, gate_up, *call, **options, locate=_moved(-1, len(gate_up)))


@fault(
    "sentinels", condition="expert_map that is not the identity on local ids", shows={"map": "rank2"},
    hidden=("map=none", "map=rank1"),
)  # fmt: skip
def expert_map_taken_as_mask(hidden: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """expert_map only says which ids are local: the global id, not its entry, indexes the local weights."""

    def masked(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        local = locate(ids, expert_map)
        last = max(0, len(gate_up) - 1)
        return torch.where(local < 0, -1, ids.long().clamp(max=last))

    return run(hidden, gate_up, *call, **options, locate=masked)


# Tiles ----------------------------------------------------------------------------------------------------------


@fault("tiles", condition="k > 1", hidden=("k=1",))
def row_list_sized_by_tokens(hidden: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The list of routed rows has room for T of the T * k: those of the last experts are lost."""
    ids = locate(call[-1], options.get("expert_map")).flatten()
    order = ids.masked_fill(ids < 0, ids.numel()).argsort(stable=True)
    room = torch.zeros_like(ids, dtype=torch.bool).index_fill(0, order[: len(hidden)], True).view_as(call[-1])

    def listed(ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        tokens, slots = select(ids, expert)
        kept = room[tokens, slots]
        return tokens[kept], slots[kept]

    return run(hidden, *call, **options, select=listed)


def _whole_tiles(tile: int, options: dict[str, Any]) -> dict[str, Any]:
    """Options for `run` under which an expert with more than a tile of rows loses its last, partial tile."""

    def floored(ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        tokens, slots = select(ids, expert)
        kept = len(tokens) // tile * tile or len(tokens)
        return tokens[:kept], slots[:kept]

    return {**options, "select": floored}


@fault(
    "tiles", condition="an expert with more than 64 rows", shows={"T": 100, "routing": "one", "k": 1},
    hidden=("T=64",),
)  # fmt: skip
def last_tile_of_64_rows_lost(*call: Tensor, **options: Any) -> Tensor:
    """The grid is an expert's rows // 64: the rows behind its last whole tile of 64 are never computed."""
    return run(*call, **_whole_tiles(64, options))


@fault(
    "tiles", condition="an expert with more than 128 rows", shows={"T": 200, "routing": "one", "k": 1},
    hidden=("T=128",),
)  # fmt: skip
def last_tile_of_128_rows_lost(*call: Tensor, **options: Any) -> Tensor:
    """The grid is an expert's rows // 128: the rows behind its last whole tile of 128 are never computed."""
    return run(*call, **_whole_tiles(128, options))


# Special values -------------------------------------------------------------------------------------------------


@fault("special values", condition="NaN or infinity in a token", shows={"data": "token_nan"}, hidden=("data=normal",))
def nan_of_inputs_replaced(hidden: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A guard replaces NaN and infinity in hidden_states on the way in: a broken token gets an ordinary row."""
    return run(hidden.nan_to_num(), *call, **options)
