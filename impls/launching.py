"""Starting Triton kernels again for the same shapes without Triton's search for the compiled kernel.

That search looks at every argument and costs several times what the start itself does: four launches of the experts
took 530 to 650 us of the host on an H200, which needs 120 to 340 us for the work.  Two ways around it:

- `Repeated` calls a function of tensors; the first call with tensors of some signature records what the function
  launches, later ones start the same kernels on their own tensors.  The function allocates with `empty` and launches
  with `launch`, and does nothing else to a device.
- `Prepared` is one kernel of which some arguments change.

A compiled kernel depends on dtypes, on which addresses are multiples of 16, and on integers that are 1 or multiples of
16; a signature holds all of that.  Nothing of a call outlives it but numbers, so calls may come from any thread and on
any stream, and be captured in a CUDA graph.  Launch hooks of Triton see the first call only.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from operator import itemgetter
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["Prepared", "Repeated", "empty", "launch"]

ALIGNMENT = 256  # bytes between the tensors of a workspace
KEPT = 1024  # plans of one function; a plan holds some kilobytes
COMPILED = ("cuda",)  # kinds of device that Triton compiles for

_recording: ContextVar["_Recording | None"] = ContextVar("recording", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, kept where a call is being recorded."""
    compiled = kernel[grid](*arguments, **constants)
    recording = _recording.get()
    if recording is not None:
        recording.keep(kernel, compiled, grid, arguments, constants)


def empty(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device of `like`, and of its dtype where none is given; memory of the plan where recorded."""
    made = torch.empty(size, dtype=dtype or like.dtype, device=like.device)
    recording = _recording.get()
    if recording is not None:
        recording.made.append(made)
    return made


def starter(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """`start(stream, *arguments)` for a kernel that Triton compiled; pointers may be given as integers."""
    x, y, z = (*grid, 1, 1)[:3]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def start(stream: int, *arguments: Any) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return start


def ordered(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> list[Any]:
    """The arguments of a compiled kernel in the order of its parameters, constants among them."""
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    return [named[name] for name in kernel.arg_names]


def _current_stream() -> int:
    """The current stream of the current device, as launchers take it."""
    return triton.runtime.driver.active.get_current_stream(torch.cuda.current_device())


def _is_current(device: torch.device) -> bool:
    return device.index == torch.cuda.current_device()


class Prepared:
    """A kernel with the arguments that stay the same.

    Args:
        kernel: a `triton.jit` function whose changing arguments come first.
        fixed: the arguments behind those, in order.
        constants: its constexpr arguments, behind all others.

    Every call has to give changing arguments that Triton would compile alike: the same dtypes, addresses that are
    multiples of 16, and integers named in `do_not_specialize`.
    """

    def __init__(self, kernel: Any, programs: int, fixed: Sequence[Any], constants: Mapping[str, Any]):
        self.kernel, self.grid, self.fixed, self.constants = kernel, (programs, 1, 1), tuple(fixed), dict(constants)
        self.start: Callable[..., None] | None = None
        self.behind: tuple[Any, ...] = ()

    def __call__(self, *changing: Any) -> None:
        if self.start is not None:
            self.start(_current_stream(), *changing, *self.behind)
            return
        compiled = self.kernel[self.grid](*changing, *self.fixed, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            self.behind = tuple(ordered(self.kernel, (*changing, *self.fixed), self.constants)[len(changing) :])
            self.start = starter(compiled, self.grid)


class _At:
    """An address that a launcher asks for as it asks a tensor."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Tiles:
    """What a launcher reads of a tensor descriptor, for memory at another address and without a hold on any."""

    __slots__ = ("base", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, like: Any, address: int = 0):
        self.base = _At(address)
        self.shape, self.strides, self.padding = like.shape, like.strides, like.padding
        self.round_f32_to_tf32 = getattr(like, "round_f32_to_tf32", False)


@dataclass
class _Recording:
    """What one call of a function allocated and launched; holds all of it, so that addresses stay apart."""

    inputs: list[Tensor]
    made: list[Tensor] = field(default_factory=list)
    launches: list[tuple[Any, Any, tuple[int, ...], list[Any]]] = field(default_factory=list)

    def keep(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any]
    ) -> None:
        self.launches.append((kernel, compiled, grid, ordered(kernel, arguments, constants)))


class _Plan:
    """The launches of one signature, their arguments as places in a row of values that each call fills anew.

    The row: addresses of the inputs, of the outputs, of the parts of one workspace; descriptors; values that stay.
    """

    def __init__(self, recording: _Recording, outputs: Sequence[Tensor]):
        self.outputs = [(tuple(out.shape), out.dtype) for out in outputs]
        parts = [made for made in recording.made if all(made is not out for out in outputs)]
        self.offsets, self.size = _packed(parts)
        memory = [*recording.inputs, *outputs, *parts]
        places: dict[int, int] = {}
        for number, tensor in enumerate(memory):
            places.setdefault(tensor.data_ptr(), number)
        self.tiles: list[tuple[_Tiles, int]] = []
        values: list[Any] = []
        rows: list[list[tuple[str, int]]] = []
        for kernel, _, _, arguments in recording.launches:
            rows.append([self._place(kernel, argument, places, values) for argument in arguments])
        first = {"memory": 0, "tiles": len(memory), "value": len(memory) + len(self.tiles)}
        self.values = tuple(values)
        self.launches = [
            (starter(compiled, grid), _picker([first[kind] + number for kind, number in row]))
            for (_, compiled, grid, _), row in zip(recording.launches, rows, strict=True)
        ]

    def _place(self, kernel: Any, argument: Any, places: dict[int, int], values: list[Any]) -> tuple[str, int]:
        """Where an argument stands: among the memory, the descriptors or the values."""
        base = getattr(argument, "base", argument)
        if not isinstance(base, Tensor):
            values.append(argument)
            return "value", len(values) - 1
        if base.data_ptr() not in places:
            raise RuntimeError(
                f"{kernel.__name__} was given memory that is neither an input nor made by launching.empty, "
                "so the call cannot be repeated with other tensors"
            )
        if base is argument:
            return "memory", places[base.data_ptr()]
        self.tiles.append((_Tiles(argument), places[base.data_ptr()]))
        return "tiles", len(self.tiles) - 1

    def __call__(self, inputs: list[Tensor], addresses: list[int]) -> list[Tensor]:
        """New outputs, from `inputs` that lie at `addresses`."""
        device = inputs[0].device
        if _is_current(device):
            return self._run(device, addresses)
        with torch.cuda.device(device):
            return self._run(device, addresses)

    def _run(self, device: torch.device, addresses: list[int]) -> list[Tensor]:
        outputs = [torch.empty(size, dtype=dtype, device=device) for size, dtype in self.outputs]
        memory = addresses + [out.data_ptr() for out in outputs]
        if self.size:
            # 16-bit floats: whoever fills fresh memory with NaN makes a NaN of it in every dtype.
            workspace = torch.empty(self.size // 2, dtype=torch.bfloat16, device=device)
            start = workspace.data_ptr()
            memory += [start + offset for offset in self.offsets]
        tiles = [_Tiles(like, memory[number]) for like, number in self.tiles]
        row = (*memory, *tiles, *self.values)
        stream = _current_stream()
        for start_kernel, chosen in self.launches:
            start_kernel(stream, *chosen(row))
        return outputs


def _picker(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes the values at `places` out of a row."""
    return itemgetter(*places) if len(places) > 1 else lambda row: tuple(row[place] for place in places)


def _packed(parts: Sequence[Tensor]) -> tuple[list[int], int]:
    """Offsets of tensors in one workspace, and its size, in bytes."""
    offsets, size = [], 0
    for part in parts:
        offsets.append(size)
        size += -(-prod(part.shape) * part.element_size() // ALIGNMENT) * ALIGNMENT
    return offsets, size


class Repeated:
    """A function whose launches are recorded at the first call of each signature and started directly afterwards.

    Args:
        function: takes tensors (or None) and options by position, and returns a tensor or a tuple of them.

    A call gives the tensors as a tuple and the options, which must be hashable, behind it.  The signature: shape,
    strides, dtype, device and alignment of every tensor, which of them start at the same address, and the options.  A
    call that returns something not made by `empty`, or under the interpreter, is not kept; nor is one that raises.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.plans: dict[Any, _Plan] = {}
        self.lock = Lock()  # of those who add a plan

    def __call__(self, tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
        given = [t for t in tensors if t is not None]
        if given[0].device.type not in COMPILED:
            return self.function(*tensors, *options)
        addresses = [t.data_ptr() for t in given]
        key = (
            *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
            *[(address % 16 == 0, addresses.index(address)) for address in addresses],
            options,
        )
        plan = self.plans.get(key)
        if plan is None:
            return self._first(key, tensors, given, options)
        outputs = plan(given, addresses)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _first(
        self, key: Any, tensors: tuple[Tensor | None, ...], given: list[Tensor], options: tuple[Any, ...]
    ) -> Any:
        recording = _Recording(given)
        token = _recording.set(recording)
        try:
            result = self.function(*tensors, *options)
        finally:
            _recording.reset(token)
        outputs = result if isinstance(result, tuple) else (result,)
        made = all(any(out is m for m in recording.made) for out in outputs)
        if made and all(compiled is not None for _, compiled, _, _ in recording.launches):
            plan = _Plan(recording, outputs)
            with self.lock:
                while len(self.plans) >= KEPT:
                    self.plans.pop(next(iter(self.plans)))
                self.plans[key] = plan
        return result
