"""What the hardware environments of tox.ini rest on; each test is skipped, with the reason, where it cannot run."""

import pytest


def allocate_and_sum(device: str) -> float:
    import torch

    return torch.ones(1000, device=device).sum().item()


@pytest.mark.gpu
def test_cuda_device_computes() -> None:
    assert allocate_and_sum("cuda:0") == 1000


@pytest.mark.multigpu(2)
def test_every_cuda_device_computes() -> None:
    assert [allocate_and_sum(f"cuda:{index}") for index in range(2)] == [1000, 1000]


@pytest.mark.accuracy
def test_lm_eval_imports() -> None:
    import lm_eval  # noqa: F401
