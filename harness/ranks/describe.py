"""What a collective moves: shapes, elements per member and bytes, read from the arguments of the call.

Bytes follow the usual algorithms and count only what leaves or enters a rank: all_gather (R-1) blocks, reduce_scatter
all blocks but its own, all_reduce the sum of both, broadcast from the root to each of the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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

    def root(self, given: dict[str, Any], name: str) -> int:
        """The global rank of a root given as global rank (`src`) or as position in the group (`group_src`)."""
        inside = given.get(f"group_{name}")
        return self.members[inside] if inside is not None else int(given.get(name) or 0)


def _numbers(tensors: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def _exchange(
    place: Place, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sends: list[int], receives: list[int]
) -> Movement:
    return Movement(inputs, outputs, sends, receives, None, place.others(sends), place.others(receives))


def all_reduce(given: dict[str, Any], place: Place) -> Movement:
    moved = 2 * (place.size - 1) * given["tensor"].numel() / place.size
    return Movement([given["tensor"]], [given["tensor"]], sent=moved, received=moved)


def broadcast(given: dict[str, Any], place: Place) -> Movement:
    root, size = place.root(given, "src"), given["tensor"].numel()
    is_root = root == place.members[place.position]
    return Movement(
        [given["tensor"]],
        [given["tensor"]],
        root=root,
        sent=(place.size - 1) * size if is_root else 0,
        received=0 if is_root else size,
    )


def reduce(given: dict[str, Any], place: Place) -> Movement:
    root, size = place.root(given, "dst"), given["tensor"].numel()
    is_root = root == place.members[place.position]
    return Movement([given["tensor"]], [], root=root, sent=0 if is_root else size, received=size if is_root else 0)


def gather(given: dict[str, Any], place: Place) -> Movement:
    root, out = place.root(given, "dst"), given.get("gather_list") or []
    sent = 0 if root == place.members[place.position] else given["tensor"].numel()
    return Movement([given["tensor"]], out, root=root, sent=sent, received=place.others(_numbers(out)))


def scatter(given: dict[str, Any], place: Place) -> Movement:
    root, parts = place.root(given, "src"), given.get("scatter_list") or []
    received = 0 if root == place.members[place.position] else given["tensor"].numel()
    return Movement([given["tensor"]], [], root=root, sent=place.others(_numbers(parts)), received=received)


def all_gather(given: dict[str, Any], place: Place) -> Movement:
    block, out = given["tensor"], given["tensor_list"]
    return _exchange(place, [block], out, [block.numel()] * place.size, _numbers(out))


def all_gather_single(given: dict[str, Any], place: Place) -> Movement:
    block, out = given["input_tensor"], given["output_tensor"]
    return _exchange(place, [block], [out], [block.numel()] * place.size, [out.numel() // place.size] * place.size)


def reduce_scatter(given: dict[str, Any], place: Place) -> Movement:
    parts, out = given["input_list"], given["output"]
    return _exchange(place, parts, [out], _numbers(parts), [out.numel()] * place.size)


def reduce_scatter_single(given: dict[str, Any], place: Place) -> Movement:
    whole, out = given["input"], given["output"]
    return _exchange(place, [whole], [out], [whole.numel() // place.size] * place.size, [out.numel()] * place.size)


def all_to_all(given: dict[str, Any], place: Place) -> Movement:
    parts, out = given["input_tensor_list"], given["output_tensor_list"]
    return _exchange(place, parts, out, _numbers(parts), _numbers(out))


def all_to_all_single(given: dict[str, Any], place: Place) -> Movement:
    sends = _split(given["input"], given.get("input_split_sizes"), place.size)
    receives = _split(given["output"], given.get("output_split_sizes"), place.size)
    return _exchange(place, [given["input"]], [given["output"]], sends, receives)


def _split(tensor: Tensor, rows: Sequence[int] | None, size: int) -> list[int]:
    if not rows:
        return [tensor.numel() // size] * size
    per_row = 1
    for length in tensor.shape[1:]:
        per_row *= length
    return [n * per_row for n in rows]


def send(given: dict[str, Any], place: Place) -> Movement:
    return Movement([given["tensor"]], [], root=place.root(given, "dst"), sent=given["tensor"].numel())


def recv(given: dict[str, Any], place: Place) -> Movement:
    return Movement([], [given["tensor"]], root=place.root(given, "src"), received=given["tensor"].numel())


def barrier(given: dict[str, Any], place: Place) -> Movement:
    return Movement()


# Name in torch.distributed -> (name in the trace, description).  Old and new names of one operation are one.
OPERATIONS: dict[str, tuple[str, Callable[[dict[str, Any], Place], Movement]]] = {
    "all_reduce": ("all_reduce", all_reduce),
    "broadcast": ("broadcast", broadcast),
    "reduce": ("reduce", reduce),
    "gather": ("gather", gather),
    "scatter": ("scatter", scatter),
    "all_gather": ("all_gather", all_gather),
    "all_gather_single": ("all_gather_single", all_gather_single),
    "all_gather_into_tensor": ("all_gather_single", all_gather_single),
    "reduce_scatter": ("reduce_scatter", reduce_scatter),
    "reduce_scatter_single": ("reduce_scatter_single", reduce_scatter_single),
    "reduce_scatter_tensor": ("reduce_scatter_single", reduce_scatter_single),
    "all_to_all": ("all_to_all", all_to_all),
    "all_to_all_single": ("all_to_all_single", all_to_all_single),
    "send": ("send", send),
    "recv": ("recv", recv),
    "isend": ("isend", send),
    "irecv": ("irecv", recv),
    "barrier": ("barrier", barrier),
}
