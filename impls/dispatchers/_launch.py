"""Starting a Triton kernel again for the same shapes without Triton's search for the compiled kernel.

That search looks at every argument and costs several times what the start itself does: with few tokens, dispatch and
combine of `symmetric` took 137 to 183 us on H200s with it, and take 47 to 51 without.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class Prepared:
    """A kernel with the arguments that stay the same.

    Args:
        kernel: a `triton.jit` function whose changing arguments come first.
        fixed: the arguments behind those, in order.
        constants: its constexpr arguments, in order, behind all others.

    Every call has to give changing arguments that Triton would compile alike: the same dtypes, addresses that are
    multiples of 16, and integers named in `do_not_specialize`.
    """

    def __init__(self, kernel: Any, programs: int, fixed: Sequence[Any], constants: Mapping[str, Any]):
        self.kernel, self.grid, self.fixed, self.constants = kernel, (programs, 1, 1), tuple(fixed), dict(constants)
        self.start: Any = None
        self.behind = (*self.fixed, *self.constants.values())

    def __call__(self, *changing: Any) -> None:
        if self.start is not None:
            self.start(*changing, *self.behind)
            return
        compiled = self.kernel[self.grid](*changing, *self.fixed, **self.constants)
        self.start = None if compiled is None else compiled[self.grid]  # the interpreter compiles nothing
