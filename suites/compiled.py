"""Kernels compiled for a Hopper GPU where there is none: what the compiler makes of them, told by a script."""

import os
import subprocess
import sys

NO_DEVICE = """
import torch, triton
from triton.backends.compiler import GPUTarget

class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(NoDevice())
"""


def for_hopper(script: str, *arguments: str) -> str:
    """What a script prints that compiles kernels (`warmup`); torch and triton are imported there.

    In a process of its own: Triton keeps one driver, and reads TRITON_INTERPRET when it is imported.
    """
    command, environment = (
        [sys.executable, "-c", NO_DEVICE + script, *arguments],
        {**os.environ, "TRITON_INTERPRET": "0"},
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
