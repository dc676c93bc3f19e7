"""A request and how far it has come."""

from dataclasses import dataclass, field
from enum import Enum

from moe_harness.impls.qwen3_moe.pages import ROOT


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        temperature: 0 takes the largest logit; otherwise a draw that depends on seed and position alone.
        top_k, top_p: cut the distribution before the draw; None: not cut.
        stop_ids: a token among these is the last one.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        tokens: prompt and the tokens that came back so far.
        computed: how many positions have their keys and values, those of steps under way included.
        pending: sampled tokens that have not come back; two while the host is a step ahead.
        table: its pages, in order.
        row: its place in the buffers on the device while it runs.
        known, prefix: how many of its pages were offered for other sequences, and the identity of the last one's
        prefix.
    """

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    computed: int = 0
    pending: int = 0
    table: list[int] = field(default_factory=list)
    row: int | None = None
    known: int = 0
    prefix: int = ROOT

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.request.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def length(self) -> int:
        """Tokens that exist, here or on the device."""
        return len(self.tokens) + self.pending

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.length - self.computed

    @property
    def complete(self) -> bool:
        """Whether every token asked for was sampled, though the last may not have come back."""
        return self.length == len(self.request.prompt) + self.request.max_new_tokens

    @property
    def alive(self) -> bool:
        return self.status in (Status.WAITING, Status.RUNNING)
