"""Small files in the released layouts give the weights that they stand for, and the messages of what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_harness.impls.checkpoints.quantized import load
from moe_harness.reference.quantized_experts import dequantised

safetensors = pytest.importorskip("safetensors.torch")
PREFIX = "model.layers.3.mlp.experts"
E, H, I = 3, 384, 128  # noqa: E741 - the field's own letter
SIZES = {"gate": (I, H), "up": (I, H), "down": (H, I)}


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """In two files and their index, beside tensors of other parts."""
    names, owners = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        held = {f"{PREFIX}.{name}": tensors[name].contiguous() for name in part}
        held[f"model.other.{number}"] = torch.zeros(2)
        safetensors.save_file(held, folder / f"part-{number}.safetensors")
        owners |= dict.fromkeys(held, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    return folder


def fp8() -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {}
    for e in range(E):
        for name, (rows, columns) in SIZES.items():
            found[f"{e}.{name}_proj.weight"] = (torch.randn(rows, columns) * 60).to(torch.float8_e4m3fn)
            found[f"{e}.{name}_proj.weight_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    return found


def packed() -> dict[str, Tensor]:
    torch.manual_seed(2)
    found = {}
    for e in range(E):
        for name, (rows, columns) in SIZES.items():
            values = torch.randint(-8, 8, (rows, columns))
            found[f"{e}.{name}_proj.weight_packed"] = in_words(values)
            found[f"{e}.{name}_proj.weight_scale"] = torch.rand(rows, columns // 128).bfloat16()
    return found


def in_words(values: Tensor) -> Tensor:
    """Eight codes an int32 as compressed-tensors packs them, by shifts."""
    codes = (values + 8).long().unflatten(-1, (-1, 8))
    words = (codes << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def blocks() -> dict[str, Tensor]:
    torch.manual_seed(3)
    found = {}
    for name, rows, columns in (("gate_up", 2 * I, H), ("down", H, I)):
        found[f"{name}_proj_blocks"] = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
        found[f"{name}_proj_scales"] = torch.randint(110, 130, (E, rows, columns // 32), dtype=torch.uint8)
        found[f"{name}_proj_bias"] = torch.randn(E, rows).bfloat16()
    return found


def test_blocks_of_fp8(tmp_path: Path) -> None:
    tensors = fp8()
    found = load(write(tmp_path, tensors), PREFIX)
    assert found.format == "fp8_block" and found.gate_up_scale.dtype == torch.float32
    matrices = dequantised(found.gate_up_proj, found.gate_up_scale, found.format)
    for e in range(E):
        for name, half in zip(("gate", "up"), matrices[e].chunk(2), strict=True):
            scale = tensors[f"{e}.{name}_proj.weight_scale_inv"].double()
            wide = torch.kron(scale, torch.ones(128, 128, dtype=torch.float64))
            assert torch.equal(half, tensors[f"{e}.{name}_proj.weight"].double() * wide)


def test_words_of_four_bits(tmp_path: Path) -> None:
    tensors = packed()
    found = load(write(tmp_path, tensors), PREFIX)
    assert found.format == "int4_group" and tuple(found.down_proj.shape) == (E, H, I // 2)
    for e in range(E):
        words = tensors[f"{e}.down_proj.weight_packed"].long() & 0xFFFFFFFF
        values = ((words[..., None] >> (4 * torch.arange(8))) & 15).flatten(-2) - 8
        scale = tensors[f"{e}.down_proj.weight_scale"].double().repeat_interleave(128, -1)
        assert torch.equal(dequantised(found.down_proj[e], found.down_scale[e], "int4_group"), values * scale)


def test_blocks_of_gpt_oss_are_those_of_transformers(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = blocks()
    found = load(write(tmp_path, tensors), PREFIX)
    theirs = mxfp4.convert_moe_packed_tensors(
        tensors["gate_up_proj_blocks"], tensors["gate_up_proj_scales"], dtype=torch.float32
    )
    theirs = theirs if theirs.shape[1] == 2 * I else theirs.transpose(1, 2)  # [E, H, 2I] as their module keeps it
    ours = dequantised(found.gate_up_proj, found.gate_up_scale, "mxfp4").float()
    assert torch.equal(ours[:, :I], theirs[:, ::2]) and torch.equal(ours[:, I:], theirs[:, 1::2])
    assert found.gate_up_bias is not None
    assert torch.equal(found.gate_up_bias[:, :I], tensors["gate_up_proj_bias"][:, ::2])
    assert torch.equal(found.down_scale, tensors["down_proj_scales"])


WRONG = [
    (fp8, "1.up_proj.weight_scale_inv", None, "lacks model.layers.3.mlp.experts.1.up_proj.weight_scale_inv"),
    (fp8, "0.gate_proj.weight", torch.zeros(I, H), "should be torch.float8_e4m3fn"),
    (fp8, "2.down_proj.weight_scale_inv", torch.zeros(1, 1), r"has the shape \(1, 1\), but should have \(3, 1\)"),
    (packed, "1.down_proj.weight_scale", torch.zeros(H, 2), "1.down_proj.weight_scale has the shape"),
    (blocks, "down_proj_blocks", torch.zeros(E, H, I // 2, dtype=torch.uint8), r"\[E, N, K / 32, 16\]"),
    (blocks, "gate_up_proj_scales", torch.zeros(E, I, H // 32, dtype=torch.uint8), "gate_up_proj_scales has the shape"),
]


@pytest.mark.parametrize(("layout", "name", "value", "message"), WRONG)
def test_what_is_wrong_is_told(tmp_path: Path, layout, name: str, value: Tensor | None, message: str) -> None:
    tensors = layout()
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, tensors), PREFIX)


def test_up_blocks_that_would_begin_inside_one_of_gate_are_refused(tmp_path: Path) -> None:
    tensors = fp8()
    for e in range(E):
        for name in ("gate", "up"):
            tensors[f"{e}.{name}_proj.weight"] = torch.zeros(72, H).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="has 72 rows, but should have a multiple of 128"):
        load(write(tmp_path, tensors), PREFIX)


def test_no_layout_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0.gate_proj.weight, x under"):
        load(write(tmp_path, {"0.gate_proj.weight": torch.zeros(2, 2), "x": torch.zeros(1)}), PREFIX)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load(tmp_path / "nowhere", PREFIX)
