"""Loading by rank: every parameter is a slice of the whole tensor, and nothing else is read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.fixtures import checkpoints
from moe_harness.impls.qwen3_moe.config import Config
from moe_harness.impls.qwen3_moe.loader import load
from moe_harness.impls.qwen3_moe.weights import Layout

WORLDS = (1, 2, 4, 8)
HEADS, KEY_HEADS, WIDTH = 8, 4, 16
CHANGES = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": WIDTH, "num_hidden_layers": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [0]}),
    "qwen2_moe": ("qwen2_moe", {"tie_word_embeddings": True}), "qwen3": ("qwen3", {}),
    "qwen3_next": ("qwen3_next", {"linear_num_key_heads": 8, "linear_num_value_heads": 16, "num_experts": 8,
                                  "shared_expert_intermediate_size": 64}),
}  # fmt: skip


class Whole:
    """A checkpoint in memory, cut as the page on distributed layouts says; knows nothing of the loader."""

    def __init__(self, held: dict[str, Tensor], rank: int, world: int, expert_parallel: bool):
        self.held, self.rank, self.world, self.expert_parallel = held, rank, world, expert_parallel

    def __getitem__(self, name: str) -> Tensor:
        """The rank's part of a parameter, by the name of the parameter."""
        layer, _, last = name.rpartition("self_attn.")
        if last.startswith("qkv_proj"):
            kind = last.split(".")[1]
            parts = {part: self.held[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"}
            return torch.cat([self.head_rows(tensor, KEY_HEADS if part in "kv" else HEADS)
                              for part, tensor in parts.items()])  # fmt: skip
        if ".experts." in name:
            return self.experts(*name.split("experts."))
        if name.endswith("gate_up_proj.weight"):
            stem = name.removesuffix("gate_up_proj.weight")
            return torch.cat([self.chunk(self.held[f"{stem}{part}_proj.weight"], 0) for part in ("gate", "up")])
        whole = self.held[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            return self.chunk(whole, 0)
        if name.endswith(("in_proj_qkvz.weight", "in_proj_ba.weight", "dt_bias", "A_log")):  # key head by key head
            return self.chunk(whole, 0)
        cut_by_columns = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
        return self.chunk(whole, 1) if name.endswith(cut_by_columns) else whole

    def chunk(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.world, dim)[self.rank]

    def head_rows(self, tensor: Tensor, heads: int) -> Tensor:
        whole = tensor.unflatten(0, (heads, -1))  # WIDTH, twice as much of a query with its gate
        if heads >= self.world:
            return self.chunk(whole, 0).flatten(0, 1)
        return whole[self.rank * heads // self.world]  # the head that this rank's queries use

    def experts(self, stem: str, kind: str) -> Tensor:
        count = len([key for key in self.held if key.startswith(f"{stem}experts.") and "down_proj" in key])
        each = count // self.world
        mine = range(self.rank * each, (self.rank + 1) * each) if self.expert_parallel else range(count)
        cut = (lambda tensor, dim: tensor) if self.expert_parallel else self.chunk
        if kind == "down_proj":
            return torch.stack([cut(self.held[f"{stem}experts.{e}.down_proj.weight"], 1) for e in mine])
        return torch.stack([
            torch.cat([cut(self.held[f"{stem}experts.{e}.{part}_proj.weight"], 0) for part in ("gate", "up")])
            for e in mine
        ])  # fmt: skip


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_a_slice_of_the_whole_tensor(family: str, expert_parallel: bool, tmp_path: Path) -> None:
    """At every world and on every rank; a bias behind the sum over ranks is the first one's alone."""
    name, changes = FAMILIES[family]
    checkpoints.make(tmp_path, name, **CHANGES, **changes)
    held = checkpoints.tensors(checkpoints.config(name, **CHANGES, **changes))
    config, compared = Config.read(tmp_path), 0
    for world in WORLDS:
        for rank in range(world):
            layout = Layout(config, rank, world, expert_parallel)
            parameters, whole = layout.empty(torch.bfloat16, "cpu"), Whole(held, rank, world, expert_parallel)
            load(tmp_path, layout, parameters)
            for key, parameter in parameters.items():
                assert torch.equal(parameter, whole[key]), f"rank {rank} of {world}: {key}"
                compared += 1
            assert any("o_proj.bias" in key for key in parameters) == (rank == 0 and "attention_bias" in changes)
    assert compared > 200


@pytest.mark.parametrize(
    ("changes", "world", "options", "message"),
    [({}, 3, {}, "num_attention_heads is 8, wanted a multiple of the 3 ranks that share it; use another number"),
     ({"moe_intermediate_size": 36}, 8, {}, "moe_intermediate_size is 36, wanted a multiple of the 8 .* or expert_par"),
     ({"num_experts": 2}, 4, {"expert_parallel": True}, "num_experts is 2, wanted at least one for each of 4 ranks"),
     ({"vocab_size": 9}, 8, {}, "vocab_size is 9, wanted some tokens for each of 8 ranks"),
     ({"num_attention_heads": 12, "num_key_value_heads": 3}, 4, {}, "a divisor or a multiple of 3 key heads"),
     ({}, 4, {"expert_parallel": True, "expert_shards": 3}, "expert_shards is 3, wanted a divisor of the 4 ranks"),
     ({}, 4, {"copies": 1}, "need expert_parallel=True"),
     ({}, 2, {"expert_parallel": True, "copies": 9}, "copies is 9, wanted at most 8")],
)  # fmt: skip
def test_what_ranks_cannot_share_is_refused(
    changes: dict[str, Any], world: int, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    keys = checkpoints.config("qwen3_moe", **CHANGES | changes)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=message):
        Layout(Config.read(tmp_path), 0, world, **options)


MEMORY = """
import ctypes, sys
from pathlib import Path
import safetensors, torch
from moe_harness.impls.qwen3_moe.config import Config
from moe_harness.impls.qwen3_moe.loader import load
from moe_harness.impls.qwen3_moe.weights import Layout

def told(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

config = Config.read(Path(sys.argv[1]))
warm = Layout(config, 0, 8)
load(Path(sys.argv[1]), warm, warm.empty(torch.bfloat16, "cpu"))  # what is imported and allocated once, is now
for world in (4, 2, 1):
    for expert_parallel in (False, True):
        layout = Layout(config, world - 1, world, expert_parallel)
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as held otherwise
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before = told("VmRSS")
        parameters = layout.empty(torch.bfloat16, "cpu")
        load(Path(sys.argv[1]), layout, parameters)
        share = sum(p.numel() * p.element_size() for p in parameters.values())
        print(world, expert_parallel, share, told("VmHWM") - before)
        del parameters
"""


def test_the_host_holds_little_more_than_the_ranks_share(tmp_path: Path) -> None:
    """The peak of the process from before the parameters exist to after they are read, mapped parts of files included.

    Under 1.2 times the share; the file's own pages would make it two, and reading tensors whole four at world 4.
    """
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 64}
    checkpoints.make(tmp_path, "qwen3_moe", **CHANGES | sizes, shards=2)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "MALLOC_TRIM_THRESHOLD_": "0"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = [line.split() for line in out.stdout.splitlines()]
    assert len(rows) == 6
    for world, expert_parallel, share, peak in rows:
        assert int(share) > 12e6, "too small to measure"
        ratio = int(peak) / int(share)
        assert ratio < 1.2, f"{ratio:.2f} times the share at world {world}, expert_parallel={expert_parallel}"
