r"""Rotary angles as a config describes them: a base, how much of a head is turned, and YaRN's scaling.

    frequency_j = theta^(-2 j / D)                                                   j = 0 .. D / 2 - 1
    YaRN:  frequency_j * (1 - ramp_j + ramp_j / factor),  ramp from 0 at plane `low` to 1 at plane `high`
           low, high = the planes that turn beta_fast and beta_slow times within the original context
           plane(n) = D * ln(context / (2 pi n)) / (2 ln theta), rounded down and up

YaRN (Peng et al., https://arxiv.org/abs/2309.00071) also sharpens attention: with m(s) = 0.1 * s * ln(factor) + 1,
cosine and sine are multiplied by m(mscale) / m(mscale_all_dim), and DeepSeek's softmax scale by m(mscale_all_dim)^2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Angles of one model.

    Attributes:
        width: D, the dimensions of a head that are turned.
        magnitude: multiplies cosine and sine.
        sharpness: multiplies the softmax scale, where the family's attention asks for it.
        factor, low, high: of YaRN's ramp; a factor of 1 scales nothing.
    """

    theta: float
    width: int
    magnitude: float = 1.0
    sharpness: float = 1.0
    factor: float = 1.0
    low: float = 0.0
    high: float = 0.0

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[D / 2], turned by per position."""
        plane = torch.arange(self.width // 2, dtype=dtype, device=device)
        ramp = ((plane - self.low) / max(self.high - self.low, 1e-3)).clamp(0, 1)
        return self.theta ** (-2 * plane / self.width) * (1 - ramp + ramp / self.factor)


def rope(config: Mapping[str, Any], width: int, scalings: tuple[str, ...] = ("default",)) -> Rope:
    """The angles of a config, whose keys are rope_parameters (transformers 5) or rope_theta and rope_scaling.

    Args:
        width: dimensions of a head that are turned.
        scalings: rope types that the family's attention has.

    Raises:
        ValueError: another rope type; a scaling without its factor.
    """
    keys = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(keys.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind not in scalings:
        raise ValueError(f"rope_type is {kind!r}, but should be {' or '.join(map(repr, scalings))}")
    return Rope(theta, width) if kind == "default" else _yarn(config, keys, theta, width)


def _yarn(config: Mapping[str, Any], keys: Mapping[str, Any], theta: float, width: int) -> Rope:
    context = keys.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    factor = keys.get("factor")
    if not context or not factor:
        raise ValueError(f"yarn has {dict(keys)}, but should have factor and original_max_position_embeddings")

    def plane(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def sharpness(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = plane(keys.get("beta_fast") or 32), plane(keys.get("beta_slow") or 1)
    if keys.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    over_all, scale = keys.get("mscale_all_dim") or 0, keys.get("mscale") or 0
    magnitude = keys.get("attention_factor")
    if magnitude is None:
        magnitude = sharpness(scale) / sharpness(over_all) if scale and over_all else sharpness(1.0)
    return Rope(
        theta, width, float(magnitude), sharpness(over_all) ** 2 if over_all else 1.0,
        float(factor), float(max(low, 0)), float(min(high, width - 1)),
    )  # fmt: skip
