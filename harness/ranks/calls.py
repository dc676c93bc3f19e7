"""One collective call of one rank as plain data: what the recorder writes and what traces are compared by."""

from dataclasses import asdict, dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RecordedCall:
    """A call of one of torch's c10d operators, numbered per rank from 0.

    `group` holds global ranks.  `sends[i]` and `receives[i]` count elements exchanged with the i-th member of the
    group, where the operation fixes them per member; `sent` and `received` are bytes that cross to or from other
    ranks by the usual algorithms (ring for all_reduce: 2 (R-1)/R of the tensor).
    """

    index: int
    op: str
    group: tuple[int, ...]
    dtype: str = ""
    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()
    root: int | None = None  # global rank, of broadcast, reduce, gather, scatter; the peer of a send or receive
    reduce: str = ""
    sent: float = 0.0
    received: float = 0.0
    site: str = ""  # file:line function of the caller

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RecordedCall":
        """The inverse of `as_dict`, also after a way through JSON, which turns tuples into lists."""
        return cls(**{name: _tupled(value) for name, value in data.items()})

    def __str__(self) -> str:
        words = [f"#{self.index} {self.op}"]
        if self.root is not None:
            words.append(f"{'with' if self.op in POINT_TO_POINT else 'root'} {self.root}")
        if self.dtype:
            words.append(f"{self.dtype} {_shapes(self.inputs) or _shapes(self.outputs)}")
        words.append(f"over ranks {list(self.group)}")
        return " ".join(words) + (f" at {self.site}" if self.site else "")


POINT_TO_POINT = ("send", "recv", "recv_any")


def _shapes(shapes: tuple[Shape, ...]) -> str:
    return " ".join(str(list(shape)) for shape in shapes)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value
