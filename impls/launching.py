"""Starting Triton kernels again for the same shapes without Triton's search for the compiled kernel.

That search looks at every argument and costs several times what the start itself does: four launches of the experts
took 340 to 610 us of the host beside an H100 that needs 170 to 500 us for the work; they take 33 to 65.  Two ways
around it:

- `Repeated` calls a function of tensors; the first call with tensors of some signature records what the function
  launches, later ones start the same kernels on their own tensors.  The function allocates with `empty` and launches
  with `launch`, and does nothing else to a device.
- `Prepared` is one kernel of which some arguments change.

A compiled kernel depends on dtypes, on which addresses are multiples of 16, and on integers that are 1 or multiples of
16; a signature holds all of that.  Nothing of a call outlives it but numbers, so calls may come from any thread and on
any stream, and be captured in a CUDA graph.  Launch hooks of Triton see the first call only.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from math import prod
from operator import itemgetter
from threading import Lock
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

__all__ = ["Prepared", "Repeated", "empty", "launch"]

ALIGNMENT = 256  # bytes between the tensors of a workspace
KEPT = 1024  # plans of one function, and addresses of one descriptor; a plan holds some kilobytes
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


@dataclass(frozen=True)
class Launcher:
    """How Triton starts a compiled kernel: function(*grid, stream, *middle, *arguments of the kernel).

    Pointers may be given as integers.  Triton 3.6 wraps its function in Python that makes every tensor descriptor anew
    and looks for scratch memory, 6 us a launch; `makers`, one for each descriptor, give what the function itself takes
    in the place of one.  With other versions there are none: descriptors are given as they are.
    """

    function: Callable[..., None]
    grid: tuple[int, int, int]
    middle: tuple[Any, ...]
    makers: tuple[Callable[["_Tiles"], list[Any]], ...] = ()

    @classmethod
    def of(cls, compiled: Any, grid: tuple[int, ...]) -> "Launcher":
        x, y, z = (*grid, 1, 1)[:3]
        run, handle, metadata = compiled.run, compiled.function, compiled.packed_metadata
        bare = _bare(run)
        if bare is None:
            return cls(run, (x, y, z), (handle, metadata, None, None, None))
        flags = run.launch_cooperative_grid, run.launch_pdl
        return cls(bare[0], (x, y, z), (handle, *flags, None, None, metadata, None, None, None), bare[1])


def _bare(run: Any) -> tuple[Callable[..., None], tuple[Callable[["_Tiles"], list[Any]], ...]] | None:
    """The function inside a launcher of Triton 3.6 that needs no scratch memory, and the makers of its descriptors."""
    import triton  # here: dispatchers import this module too, and each rank of a CPU would wait a third of a second

    if not triton.__version__.startswith("3.6.") or type(run).__name__ != "CudaLauncher":
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    if isinstance(run.launch, BuiltinFunctionType):
        return run.launch, ()
    wrapped = inspect.getclosurevars(run.launch)
    function, metas = wrapped.nonlocals.get("launcher"), wrapped.nonlocals.get("tensordesc_meta")
    make = wrapped.globals.get("make_tensordesc_arg")
    if not isinstance(function, BuiltinFunctionType) or make is None or not metas or None in metas:
        return None
    return function, tuple(lambda tiles, meta=meta: make(tiles, meta) for meta in metas)  # type: ignore[misc]


def ordered(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> list[Any]:
    """The arguments of a compiled kernel in the order of its parameters, constants among them."""
    named = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
    return [named[name] for name in kernel.arg_names]


def _current_stream(device: int) -> int:
    """The current stream of a device, as launchers take it."""
    return _streams()(device)


@cache
def _streams() -> Callable[[int], int]:
    import triton

    return triton.runtime.driver.active.get_current_stream


def _current_device() -> int:
    return torch.cuda.current_device()


class Prepared:
    """A kernel with the arguments that stay the same.

    Args:
        kernel: a `triton.jit` function whose changing arguments come first.
        fixed: the arguments behind those, in order.
        constants: its constexpr arguments, behind all others.

    Every call has to give changing arguments that Triton would compile alike: the same dtypes, addresses that are
    multiples of 16, and integers named in `do_not_specialize`.  None of them may be a tensor descriptor.
    """

    def __init__(self, kernel: Any, programs: int, fixed: Sequence[Any], constants: Mapping[str, Any]):
        self.kernel, self.grid, self.fixed, self.constants = kernel, (programs, 1, 1), tuple(fixed), dict(constants)
        self.behind: list[Any] = []
        self.launcher: Launcher | None = None

    def __call__(self, *changing: Any) -> None:
        if self.launcher is not None:
            start = self.launcher
            start.function(*start.grid, _current_stream(_current_device()), *start.middle, *changing, *self.behind)
            return
        compiled = self.kernel[self.grid](*changing, *self.fixed, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            self.behind = ordered(self.kernel, (*changing, *self.fixed), self.constants)[len(changing) :]
            self.launcher = Launcher.of(compiled, self.grid)


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


class _Descriptor:
    """The part of a tensor descriptor that depends on the address of its memory, made once for each address."""

    def __init__(self, like: Any, memory: int, make: Callable[[_Tiles], Any]):
        self.like, self.memory, self.make = _Tiles(like), memory, make
        self.known: dict[int, Any] = {}

    def at(self, address: int) -> Any:
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= KEPT:
                self.known.clear()
            found = self.known[address] = self.make(_Tiles(self.like, address))
        return found


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
    """The launches of one signature.

    What they take stands in one row that each call fills anew: the stream; addresses of the inputs, of the outputs and
    of the parts of one workspace; descriptors; values that stay.  A launch is a function and where in the row its
    arguments are.
    """

    def __init__(self, recording: _Recording, outputs: Sequence[Tensor]):
        self.device = recording.inputs[0].device
        self.outputs = [(tuple(out.shape), out.stride(), out.dtype) for out in outputs]
        parts = [made for made in recording.made if all(made is not out for out in outputs)]
        self.offsets, self.size = _packed(parts)
        self.places: dict[int, int] = {}
        for number, tensor in enumerate([*recording.inputs, *outputs, *parts]):
            self.places.setdefault(tensor.data_ptr(), number)
        self.descriptors: list[_Descriptor] = []
        self.values: list[Any] = []
        rows = [(Launcher.of(compiled, grid), kernel, args) for kernel, compiled, grid, args in recording.launches]
        chosen = [self._chosen(start, kernel, args) for start, kernel, args in rows]
        count = len(recording.inputs) + len(outputs) + len(parts)
        first = {"stream": 0, "memory": 1, "descriptor": 1 + count, "value": 1 + count + len(self.descriptors)}
        self.launches = [
            (start.function, itemgetter(*(first[kind] + number for kind, number in places)))
            for (start, _, _), places in zip(rows, chosen, strict=True)
        ]

    def _chosen(self, start: Launcher, kernel: Any, arguments: list[Any]) -> list[tuple[str, int]]:
        """Where in the row the arguments of a launch are: the kind, and the number among those of that kind."""
        chosen = [self._value(size) for size in start.grid]
        chosen += [("stream", 0), *[self._value(value) for value in start.middle]]
        makers = iter(start.makers)
        for argument in arguments:
            base = getattr(argument, "base", argument)
            if not isinstance(base, Tensor):
                chosen.append(self._value(argument))
                continue
            if base.data_ptr() not in self.places:
                raise RuntimeError(
                    f"{kernel.__name__} was given memory that is neither an input nor made by launching.empty, "
                    "so the call cannot be repeated with other tensors"
                )
            memory = self.places[base.data_ptr()]
            chosen += [("memory", memory)] if base is argument else self._tiles(argument, memory, next(makers, None))
        return chosen

    def _value(self, value: Any) -> tuple[str, int]:
        self.values.append(value)
        return "value", len(self.values) - 1

    def _tiles(self, argument: Any, memory: int, maker: Callable[[_Tiles], list[Any]] | None) -> list[tuple[str, int]]:
        """A descriptor; what its maker gives behind the first value does not depend on the address."""
        make = (lambda tiles: maker(tiles)[0]) if maker else (lambda tiles: tiles)
        self.descriptors.append(_Descriptor(argument, memory, make))
        stays = maker(_Tiles(argument, argument.base.data_ptr()))[1:] if maker else []
        return [("descriptor", len(self.descriptors) - 1), *[self._value(value) for value in stays]]

    def __call__(self, addresses: list[int]) -> list[Tensor]:
        """New outputs, from inputs at `addresses`."""
        if self.device.index == _current_device():
            return self._run(addresses)
        with torch.cuda.device(self.device):
            return self._run(addresses)

    def _run(self, addresses: list[int]) -> list[Tensor]:
        device = self.device
        # A fifth quicker than torch.empty.
        outputs = [torch.empty_strided(size, by, dtype=dtype, device=device) for size, by, dtype in self.outputs]
        memory = addresses + [out.data_ptr() for out in outputs]
        if self.size:
            # 16-bit floats: whoever fills fresh memory with NaN makes a NaN of it in every dtype.
            workspace = torch.empty_strided((self.size // 2,), (1,), dtype=torch.bfloat16, device=device)
            start = workspace.data_ptr()
            memory += [start + offset for offset in self.offsets]
        descriptors = [descriptor.at(memory[descriptor.memory]) for descriptor in self.descriptors]
        row = (_current_stream(device.index), *memory, *descriptors, *self.values)
        for function, arguments in self.launches:
            function(*arguments(row))
        return outputs


def _packed(parts: Sequence[Tensor]) -> tuple[list[int], int]:
    """Offsets of tensors in one workspace, and its size, in bytes."""
    offsets, size = [], 0
    for part in parts:
        offsets.append(size)
        size += -(-prod(part.shape) * part.element_size() // ALIGNMENT) * ALIGNMENT
    return offsets, size


def _signature(
    tensors: tuple[Tensor | None, ...], given: list[Tensor], addresses: list[int], options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """What a plan depends on.  Flat, and short where every address is aligned and another: it is made at every call."""
    together = 0
    for address in addresses:
        together |= address
    return (
        options,
        *[tensor.shape for tensor in given],
        *[tensor.stride() for tensor in given],
        *[tensor.dtype for tensor in given],
        *[tensor.get_device() for tensor in given],
        len(given) == len(tensors) or tuple(tensor is None for tensor in tensors),
        together % 16 == 0 or tuple(address % 16 == 0 for address in addresses),
        len(set(addresses)) == len(addresses) or tuple(map(addresses.index, addresses)),
    )


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
        given = [tensor for tensor in tensors if tensor is not None]
        addresses = [tensor.data_ptr() for tensor in given]
        key = _signature(tensors, given, addresses, options)
        plan = self.plans.get(key)
        if plan is None:
            return self._first(key, tensors, options)
        outputs = plan(addresses)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _first(self, key: tuple[Any, ...], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
        inputs = [tensor for tensor in tensors if tensor is not None]
        if inputs[0].device.type not in COMPILED:
            return self.function(*tensors, *options)
        recording = _Recording(inputs)
        token = _recording.set(recording)
        try:
            result = self.function(*tensors, *options)
        finally:
            _recording.reset(token)
        outputs = result if isinstance(result, tuple) else (result,)
        made = all(any(out is known for known in recording.made) for out in outputs)
        if made and all(compiled is not None for _, compiled, _, _ in recording.launches):
            plan = _Plan(recording, outputs)
            with self.lock:
                while len(self.plans) >= KEPT:
                    self.plans.pop(next(iter(self.plans)))
                self.plans[key] = plan
        return result
