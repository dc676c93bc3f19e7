"""The Triton kernels: what no stage's suite asks, and a sample of what they all ask under Triton's interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# On a GPU these tests belong to the environment gpu; without one they run interpreted, with every change.
runnable = [
    pytest.mark.skipif(not (CUDA or INTERPRETED), reason="Triton needs a CUDA device or TRITON_INTERPRET=1"),
    *([pytest.mark.gpu] if CUDA else []),
]
