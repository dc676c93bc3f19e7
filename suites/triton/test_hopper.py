"""The kernels for Hopper compile for that GPU without one, into the instructions they are written for.

What they compute is checked on a GPU, in test_configs; the interpreter cannot run Gluon.
"""

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from moe_harness.suites.compiled import for_hopper

SETUP = """
import sys
from moe_harness.impls.triton import _gate_up_hopper, _hopper, _linear_hopper

gl, Descriptor = _hopper.gl, _gate_up_hopper.TensorDescriptor
E, H, I, k = 128, 2048, 768, 8
x = torch.empty(16, H, dtype=getattr(torch, sys.argv[1]))
counts = torch.empty(3, E, dtype=torch.int32)
common = dict(BLOCK_E=E, GROUP=8, launch_pdl=True, num_warps=4, grid=(132,))
"""
FIRST = """
up = x.new_empty(1, 2, I, H).expand(E, -1, -1, -1)
w = Descriptor(up, list(up.shape), [2 * I * H, I * H, H, 1], [1, 2, 64, 64], gl.NVMMASharedLayout(128, 16, 4))
kernel = _gate_up_hopper._gate_up_hopper.warmup(
    x, w, x, counts, counts, H, I, E=E, H=H, WIDTH=I, top_k=k, GELU=sys.argv[2] == "gelu_tanh", **common
)
"""
SECOND = """
down = x.new_empty(1, H, I).expand(E, -1, -1)
w = Descriptor(down, list(down.shape), [H * I, I, 1], [1, 256, 64], gl.NVMMASharedLayout(128, 16, 3))
act = x.new_empty(16, I)
a = Descriptor(act, list(act.shape), [I, 1], [64, 64], gl.NVMMASharedLayout(128, 16, 2))
kernel = _linear_hopper._linear_hopper.warmup(a, w, x, counts, counts, H, E=E, K=I, N=H, **common)
"""
TELL = """
print("shared memory", kernel.metadata.shared)
print(kernel.asm["ptx"])
"""
SHARED_MEMORY = 232448  # bytes a program may have
BOTH = ("m64n256k16.f32.{0}.{0}", "m64n128k16.f32.{0}.{0}", "setmaxnreg", "griddepcontrol.wait")


@pytest.mark.parametrize(
    ("source", "dtype", "activation", "instructions"),
    [
        (FIRST, "bfloat16", "silu", ("cp.async.bulk.tensor.4d", "cp.async.mbarrier.arrive.noinc")),
        (FIRST, "float16", "gelu_tanh", ("cp.async.bulk.tensor.4d", "cp.async.mbarrier.arrive.noinc")),
        (SECOND, "bfloat16", "silu", ("cp.async.bulk.tensor.3d", "cp.async.bulk.tensor.2d")),
    ],
)
def test_kernel_compiles_for_hopper(source: str, dtype: str, activation: str, instructions: tuple[str, ...]) -> None:
    first, ptx = for_hopper(SETUP + source + TELL, dtype, activation).split("\n", 1)
    assert int(first.split()[-1]) <= SHARED_MEMORY, first
    for wanted in BOTH + instructions:
        wanted = wanted.format("bf16" if dtype == "bfloat16" else "f16")
        assert wanted in ptx, f"the kernel should use {wanted}"
