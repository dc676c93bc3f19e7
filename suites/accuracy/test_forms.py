"""The models in another form are the one as it is: what they think of the worked answers moves by roundings alone."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_harness.fixtures.arithmetic import shared, wide
from moe_harness.harness.gate.answerers import find
from moe_harness.suites.accuracy.test_answerers import SETTINGS, requests

DOWN = "shared_expert.down_proj.weight"


def golds(folder, asked):
    return find("transformers:eager", replace(SETTINGS, model=folder)).golds(asked)


def shift(folder, asked, trusted):
    """Nats by which the worked answers move, and tokens whose likeliest is another one."""
    found = golds(folder, asked)
    moved = math.fsum(abs(a.loglikelihood - b.loglikelihood) for a, b in zip(found, trusted, strict=True))
    return moved, sum(
        x != y for a, b in zip(found, trusted, strict=True) for x, y in zip(a.greedy, b.greedy, strict=True)
    )


def test_it_computes_what_the_other_does_and_its_shared_expert_counts(tmp_path):
    """Planted: a shared expert that is counted twice, as one that is summed over two ranks."""
    from safetensors.torch import load_file, save_file

    shared.write(tmp_path)
    asked = requests(4, shots=3)
    trusted = golds(shared.MODEL, asked)
    moved, flips = shift(tmp_path, asked, trusted)
    weights = load_file(tmp_path / "model.safetensors")
    twice = {name: 2 * weight if name.endswith(DOWN) else weight for name, weight in weights.items()}
    save_file(twice, tmp_path / "model.safetensors", {"format": "pt"})
    planted, _ = shift(tmp_path, asked, trusted)
    assert flips == 0
    assert planted > 100 * moved


def test_more_heads_compute_what_fewer_do_and_each_copy_counts(tmp_path):
    """Planted: the last copy of a head left out of the sum, as where the last rank's part is."""
    from safetensors.torch import load_file, save_file

    wide.write(tmp_path)
    asked = requests(4, shots=3)
    trusted = golds(shared.MODEL, asked)
    moved, flips = shift(tmp_path, asked, trusted)
    weights = load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("o_proj.weight"):
            weight[:, -32:] = 0
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    planted, _ = shift(tmp_path, asked, trusted)
    assert flips == 0
    assert planted > 100 * moved
