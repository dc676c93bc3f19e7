"""The experts of one layer from a checkpoint with quantised weights, in the form of the stage `quantized_experts`.

Three released layouts are known:

- fp8_block: `experts.{e}.{gate,up,down}_proj.weight` in e4m3 with `weight_scale_inv` (Qwen3-FP8, DeepSeek-V3).
- int4_group: `experts.{e}.{...}_proj.weight_packed`, eight codes an int32, with `weight_scale` (compressed-tensors,
  symmetric, groups of 128).
- mxfp4: `experts.{gate_up,down}_proj_{blocks,scales,bias}`, rows of gate and up in turn (gpt-oss).

Codes and scales are kept bit for bit; gate rows come first.  A tensor that is missing, of another shape or dtype, or a
size at which the two forms do not agree, raises ValueError with the key, what was found and what was wanted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_harness.impls.qwen3_moe.loader import files_of

__all__ = ["Weights", "load"]

BLOCK, GROUP, MX_BLOCK = 128, 128, 32
PER_INT32 = 8
Find = Callable[[str], Tensor]
Lists = tuple[list[Tensor], list[Tensor]]  # codes and scales, expert after expert


class Weights(NamedTuple):
    """What the stage takes of a layer; `format` and the biases are keyword arguments there."""

    gate_up_proj: Tensor
    gate_up_scale: Tensor
    down_proj: Tensor
    down_scale: Tensor
    format: str
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def load(folder: Path, prefix: str) -> Weights:
    """The experts under `prefix` ("model.layers.0.mlp.experts") of a folder of *.safetensors.

    Raises:
        ValueError: no tensors there, or none of the three layouts; a tensor as the module says.
        FileNotFoundError: no such folder, or no weights in it.
    """
    from safetensors import safe_open

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder, but should hold config.json and *.safetensors")
    owners: dict[str, Path] = {}
    for file in files_of(folder):
        with safe_open(file, framework="pt") as opened:
            owners |= {key: file for key in opened.keys() if key.startswith(f"{prefix}.")}  # noqa: SIM118

    def find(name: str) -> Tensor:
        key = f"{prefix}.{name}"
        if key not in owners:
            raise ValueError(f"{folder} lacks {key}")
        with safe_open(owners[key], framework="pt") as opened:
            return opened.get_tensor(key)

    names = {key.removeprefix(f"{prefix}.") for key in owners}
    if "gate_up_proj_blocks" in names:
        return of_blocks(find)
    experts = len({name.split(".")[0] for name in names if name.split(".")[0].isdigit()})
    if "0.gate_proj.weight_scale_inv" in names:
        return of_fp8(find, experts)
    if "0.gate_proj.weight_packed" in names:
        return of_packed(find, experts)
    told = ", ".join(sorted(names)[:4]) or "nothing"
    raise ValueError(
        f"{folder} has {told} under {prefix}, but should have weight_scale_inv, weight_packed or gate_up_proj_blocks"
    )


def of_fp8(find: Find, experts: int) -> Weights:
    """e4m3 with a scale for each 128 x 128; up's blocks begin anew behind gate's, so I is a multiple of 128."""
    first: Lists = ([], [])
    second: Lists = ([], [])
    for expert in range(experts):
        gate, up, down = (_fp8(find, f"{expert}.{name}_proj") for name in ("gate", "up", "down"))
        rows = gate[0].shape[0]
        if rows % BLOCK:
            raise ValueError(
                f"{expert}.gate_proj.weight has {rows} rows, but should have a multiple of {BLOCK}: the blocks of up "
                "would begin inside one of gate's"
            )
        for kept, parts in ((first, (gate, up)), (second, (down,))):
            kept[0].append(torch.cat([codes.view(torch.uint8) for codes, _ in parts]).view(torch.float8_e4m3fn))
            kept[1].append(torch.cat([scale for _, scale in parts]))
    return Weights(_stack(first[0]), torch.stack(first[1]), _stack(second[0]), torch.stack(second[1]), "fp8_block")


def _fp8(find: Find, name: str) -> tuple[Tensor, Tensor]:
    codes, scale = find(f"{name}.weight"), find(f"{name}.weight_scale_inv")
    _require(f"{name}.weight", codes, torch.float8_e4m3fn, None)
    wanted = tuple(-(-size // BLOCK) for size in codes.shape)
    _require(f"{name}.weight_scale_inv", scale, None, wanted)
    return codes, scale.float()


def of_packed(find: Find, experts: int) -> Weights:
    """Eight codes of four bits an int32, the first in the lowest bits, 8 standing for 0; a scale for each 128."""
    first: Lists = ([], [])
    second: Lists = ([], [])
    for expert in range(experts):
        gate, up, down = (_packed(find, f"{expert}.{name}_proj") for name in ("gate", "up", "down"))
        for kept, parts in ((first, (gate, up)), (second, (down,))):
            kept[0].append(torch.cat([codes for codes, _ in parts]))
            kept[1].append(torch.cat([scale for _, scale in parts]))
    return Weights(
        torch.stack(first[0]), torch.stack(first[1]), torch.stack(second[0]), torch.stack(second[1]), "int4_group"
    )


def _packed(find: Find, name: str) -> tuple[Tensor, Tensor]:
    codes, scale = find(f"{name}.weight_packed"), find(f"{name}.weight_scale")
    _require(f"{name}.weight_packed", codes, torch.int32, None)
    rows, words = codes.shape
    _require(f"{name}.weight_scale", scale, None, (rows, words * PER_INT32 // GROUP))
    return codes.contiguous().view(torch.uint8), scale  # a word's bytes come lowest first


def of_blocks(find: Find) -> Weights:
    """e2m1 in blocks of 32 with an exponent each; rows of gate and up in turn."""
    first, second = _blocks(find, "gate_up_proj"), _blocks(find, "down_proj")
    halves = [torch.cat([part[:, ::2], part[:, 1::2]], 1) for part in first]
    return Weights(halves[0], halves[1], second[0], second[1], "mxfp4", halves[2], second[2])


def _blocks(find: Find, name: str) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, bias = find(f"{name}_blocks"), find(f"{name}_scales"), find(f"{name}_bias")
    _require(f"{name}_blocks", codes, torch.uint8, None)
    if codes.dim() != 4 or codes.shape[-1] != MX_BLOCK // 2:
        raise ValueError(f"{name}_blocks has the shape {tuple(codes.shape)}, but should have [E, N, K / 32, 16]")
    _require(f"{name}_scales", scale, torch.uint8, tuple(codes.shape[:3]))
    _require(f"{name}_bias", bias, None, tuple(codes.shape[:2]))
    return codes.flatten(-2), scale, bias


def _stack(codes: list[Tensor]) -> Tensor:
    """torch.stack of 8-bit floats, which it does not know everywhere."""
    return torch.stack([c.view(torch.uint8) for c in codes]).view(codes[0].dtype)


def _require(name: str, tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...] | None) -> None:
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, but should be {dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, but should have {shape}")
