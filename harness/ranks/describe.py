"""What a collective moves: shapes, elements per member and bytes, read from the arguments of torch's c10d operator.

Bytes follow the usual algorithms and count only what leaves or enters a rank: all_gather (R-1) blocks, reduce_scatter
all blocks but its own, all_reduce the sum of both, broadcast from the root to each of the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Given = dict[str, Any]  # arguments by their names in the operator's schema


@dataclass(frozen=True)
class Movement:
    """What `describe` finds in the arguments; see `harness.ranks.calls.Call` for the meaning of the fields."""

    inputs: Sequence[Tensor] = ()
    outputs: Sequence[Tensor] = ()
    sends: Sequence[int] = ()
    receives: Sequence[int] = ()
    root: int | None = None
    sent: float = 0.0  # elements, as `received`
    received: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a call happens: members of the group by global rank, and this rank's position among them."""

    members: tuple[int, ...]
    position: int

    @property
    def size(self) -> int:
        return len(self.members)

    def others(self, elements: Sequence[int]) -> int:
        return sum(n for i, n in enumerate(elements) if i != self.position)

    def is_root(self, given: Given) -> bool:
        return given["root_rank"] == self.position


def _numbers(tensors: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def _flat(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]


def _exchange(
    place: Place, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sends: list[int], receives: list[int]
) -> Movement:
    return Movement(inputs, outputs, sends, receives, None, place.others(sends), place.others(receives))


def all_reduce(given: Given, place: Place) -> Movement:
    moved = 2 * (place.size - 1) * sum(_numbers(given["tensors"])) / place.size
    return Movement(given["tensors"], given["tensors"], sent=moved, received=moved)


def broadcast(given: Given, place: Place) -> Movement:
    tensors, size, is_root = given["tensors"], sum(_numbers(given["tensors"])), place.is_root(given)
    sent, received = ((place.size - 1) * size, 0) if is_root else (0, size)
    return Movement(tensors, tensors, root=place.members[given["root_rank"]], sent=sent, received=received)


def reduce(given: Given, place: Place) -> Movement:
    size, is_root = sum(_numbers(given["tensors"])), place.is_root(given)
    sent, received = (0, size) if is_root else (size, 0)
    return Movement(given["tensors"], [], root=place.members[given["root_rank"]], sent=sent, received=received)


def gather(given: Given, place: Place) -> Movement:
    own, out = given["input_tensors"], _flat(given["output_tensors"])
    sent = 0 if place.is_root(given) else sum(_numbers(own))
    root = place.members[given["root_rank"]]
    return Movement(own, out, root=root, sent=sent, received=place.others(_numbers(out)))


def scatter(given: Given, place: Place) -> Movement:
    own, parts = given["output_tensors"], _flat(given["input_tensors"])
    received = 0 if place.is_root(given) else sum(_numbers(own))
    root = place.members[given["root_rank"]]
    return Movement(own, [], root=root, sent=place.others(_numbers(parts)), received=received)


def all_gather(given: Given, place: Place) -> Movement:
    blocks, out = given["input_tensors"], _flat(given["output_tensors"])
    return _exchange(place, blocks, out, [sum(_numbers(blocks))] * place.size, _numbers(out))


def all_gather_lists(given: Given, place: Place) -> Movement:
    """Several tensors at once: output_lists[i] holds each member's i-th tensor."""
    blocks, lists = given["input_list"], given["output_lists"]
    receives = [sum(_numbers(parts)) for parts in zip(*lists, strict=True)]
    return _exchange(place, blocks, _flat(lists), [sum(_numbers(blocks))] * place.size, receives)


def all_gather_single(given: Given, place: Place) -> Movement:
    return all_gather_singles({"inputs": [given["input_tensor"]], "outputs": [given["output_tensor"]]}, place)


def all_gather_singles(given: Given, place: Place) -> Movement:
    own, out = sum(_numbers(given["inputs"])), sum(_numbers(given["outputs"]))
    return _exchange(place, given["inputs"], given["outputs"], [own] * place.size, [out // place.size] * place.size)


def reduce_scatter(given: Given, place: Place) -> Movement:
    parts, out = _flat(given["input_tensors"]), given["output_tensors"]
    return _exchange(place, parts, out, _numbers(parts), [sum(_numbers(out))] * place.size)


def reduce_scatter_single(given: Given, place: Place) -> Movement:
    return reduce_scatter_singles({"inputs": [given["input_tensor"]], "outputs": [given["output_tensor"]]}, place)


def reduce_scatter_singles(given: Given, place: Place) -> Movement:
    whole, out = sum(_numbers(given["inputs"])), sum(_numbers(given["outputs"]))
    return _exchange(place, given["inputs"], given["outputs"], [whole // place.size] * place.size, [out] * place.size)


def all_to_all(given: Given, place: Place) -> Movement:
    parts, out = given["input_tensors"], given["output_tensors"]
    return _exchange(place, parts, out, _numbers(parts), _numbers(out))


def all_to_all_single(given: Given, place: Place) -> Movement:
    sends = _split(given["input"], given["input_split_sizes"], place.size)
    receives = _split(given["output"], given["output_split_sizes"], place.size)
    return _exchange(place, [given["input"]], [given["output"]], sends, receives)


def _split(tensor: Tensor, rows: Sequence[int], size: int) -> list[int]:
    if not rows:
        return [tensor.numel() // size] * size
    per_row = 1
    for length in tensor.shape[1:]:
        per_row *= length
    return [n * per_row for n in rows]


def send(given: Given, place: Place) -> Movement:
    return Movement(given["tensors"], [], root=place.members[given["dst"]], sent=sum(_numbers(given["tensors"])))


def recv(given: Given, place: Place) -> Movement:
    return Movement([], given["tensors"], root=place.members[given["src"]], received=sum(_numbers(given["tensors"])))


def recv_any(given: Given, place: Place) -> Movement:
    return Movement([], given["tensors"], received=sum(_numbers(given["tensors"])))


def barrier(given: Given, place: Place) -> Movement:
    return Movement()


# Operator of torch's namespace c10d -> (name in the trace, description).  Several at once are one call of that name.
OPERATORS: dict[str, tuple[str, Callable[[Given, Place], Movement]]] = {
    "allreduce_": ("all_reduce", all_reduce),
    "allreduce_coalesced_": ("all_reduce", all_reduce),
    "broadcast_": ("broadcast", broadcast),
    "reduce_": ("reduce", reduce),
    "gather_": ("gather", gather),
    "scatter_": ("scatter", scatter),
    "allgather_": ("all_gather", all_gather),
    "allgather_coalesced_": ("all_gather", all_gather_lists),
    "_allgather_base_": ("all_gather_single", all_gather_single),
    "allgather_into_tensor_coalesced_": ("all_gather_single", all_gather_singles),
    "reduce_scatter_": ("reduce_scatter", reduce_scatter),
    "_reduce_scatter_base_": ("reduce_scatter_single", reduce_scatter_single),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter_single", reduce_scatter_singles),
    "alltoall_": ("all_to_all", all_to_all),
    "alltoall_base_": ("all_to_all_single", all_to_all_single),
    "send": ("send", send),
    "recv_": ("recv", recv),
    "recv_any_source_": ("recv_any", recv_any),
    "barrier": ("barrier", barrier),
    "monitored_barrier_": ("monitored_barrier", barrier),
}
