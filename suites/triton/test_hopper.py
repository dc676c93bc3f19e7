"""The kernels for Hopper compile for that GPU without one, into the instructions they are written for.

What they compute is checked on a GPU, in test_configs; the interpreter cannot run Gluon.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

SETUP = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget

class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(NoDevice())
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
    """In a process of its own: Triton keeps one driver, and reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + source + TELL, dtype, activation],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, ptx = done.stdout.split("\n", 1)
    assert int(first.split()[-1]) <= SHARED_MEMORY, first
    for wanted in BOTH + instructions:
        wanted = wanted.format("bf16" if dtype == "bfloat16" else "f16")
        assert wanted in ptx, f"the kernel should use {wanted}"
