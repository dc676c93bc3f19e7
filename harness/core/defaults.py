"""What code under judgement sets for the whole process is put back: the judge makes its own tensors with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_defaults() -> Iterator[None]:
    """Put back torch's default dtype and device, number of threads, grad mode and determinism as they are now."""
    dtype, device, grad = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
