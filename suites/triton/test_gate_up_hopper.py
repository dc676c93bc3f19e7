"""The first product's kernel for Hopper compiles for that GPU without one, into the instructions it is written for.

What it computes is checked on a GPU, in test_configs; the interpreter cannot run Gluon.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget

class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(NoDevice())
from impls.triton import _gate_up_hopper as module

experts, hidden, width, top_k = 128, 2048, 768, 8
x = torch.empty(16, hidden, dtype=getattr(torch, sys.argv[1]))
up = x.new_empty(1, 2, width, hidden).expand(experts, -1, -1, -1)
layout = module.gl.NVMMASharedLayout(128, 16, 4)
strides = [2 * width * hidden, width * hidden, hidden, 1]
w = module.TensorDescriptor(up, list(up.shape), strides, [1, 2, 128, 64], layout)
counts = torch.empty(3, experts, dtype=torch.int32)
kernel = module._gate_up_hopper.warmup(
    x, w, x, counts, counts, experts, hidden, width, top_k, hidden, width,
    BLOCK_E=128, GROUP=8, GELU=sys.argv[2] == "gelu_tanh", launch_pdl=True, num_warps=4, grid=(132,),
)
print("shared memory", kernel.metadata.shared)
print(kernel.asm["ptx"])
"""
SHARED_MEMORY = 232448  # bytes a program may have


@pytest.mark.parametrize("dtype, activation", [("bfloat16", "silu"), ("float16", "gelu_tanh")])
def test_kernel_compiles_for_hopper(dtype: str, activation: str) -> None:
    """In a process of its own: Triton keeps one driver, and reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, dtype, activation],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, ptx = done.stdout.split("\n", 1)
    assert int(first.split()[-1]) <= SHARED_MEMORY, first
    short = "bf16" if dtype == "bfloat16" else "f16"
    for wanted in (f"m64n256k16.f32.{short}.{short}", "cp.async.bulk.tensor.4d", "cp.async.mbarrier.arrive.noinc",
                   "setmaxnreg", "griddepcontrol.wait"):  # fmt: skip
        assert wanted in ptx, f"the kernel should use {wanted}"
