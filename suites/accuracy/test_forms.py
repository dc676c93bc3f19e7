"""The models in another form are the one as it is: what they think of the worked answers moves by roundings alone."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_harness.fixtures.arithmetic import shared, wide
from moe_harness.fixtures.arithmetic.rewriting import MODEL
from moe_harness.harness.gate.answerers import find
from moe_harness.suites.accuracy.test_answerers import SETTINGS, requests

DOWN = "shared_expert.down_proj.weight"
HEAD = 32  # columns of one


def golds(folder, asked):
    return find("transformers:eager", replace(SETTINGS, model=folder)).golds(asked)


def shift(folder, asked, trusted):
    """Nats by which the worked answers move, and tokens whose likeliest is another one."""
    found = golds(folder, asked)
    moved = math.fsum(abs(a.loglikelihood - b.loglikelihood) for a, b in zip(found, trusted, strict=True))
    return moved, sum(
        x != y for a, b in zip(found, trusted, strict=True) for x, y in zip(a.greedy, b.greedy, strict=True)
    )


def check(form, folder, plant):
    """The form computes what the model does; what `plant` makes of a weight by its name is another function."""
    from safetensors.torch import load_file, save_file

    form.write(folder)
    asked = requests(4, shots=3)
    trusted = golds(MODEL, asked)
    moved, flips = shift(folder, asked, trusted)
    weights = load_file(folder / "model.safetensors")
    planted = {name: plant(name, weight) for name, weight in weights.items()}
    save_file(planted, folder / "model.safetensors", {"format": "pt"})
    assert flips == 0
    assert shift(folder, asked, trusted)[0] > 100 * moved


def test_a_shared_expert_counts(tmp_path):
    """Planted: one that is counted twice, as where it is summed over two ranks."""
    check(shared, tmp_path, lambda name, weight: 2 * weight if name.endswith(DOWN) else weight)


def test_each_copy_of_a_head_counts(tmp_path):
    """Planted: the last one is left out of the sum, as where the last rank's part is."""

    def without_last_head(name, weight):
        if name.endswith("o_proj.weight"):
            weight[:, -HEAD:] = 0
        return weight

    check(wide, tmp_path, without_last_head)
