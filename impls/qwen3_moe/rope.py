r"""YaRN's rotary angles as DeepSeek has them: tables of cosine and sine, and a sharper softmax.

    frequency_j = theta^(-2 j / D) * (1 - ramp_j + ramp_j / factor)       j = 0 .. D / 2 - 1, a plane of two dimensions
    ramp_j      = (j - low) / (high - low), within 0 and 1
    low, high   = the planes that turn beta_fast and beta_slow times in the original context

https://arxiv.org/abs/2309.00071, section 3.2; transformers 5.17 is the reading of record.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Angles:
    """Rotary angles of `width` dimensions.

    Attributes:
        magnitude: multiplies cosine and sine.
        sharpness: multiplies the softmax scale.
        factor, low, high: of the ramp; a factor of 1 scales nothing.
    """

    theta: float
    width: int
    magnitude: float = 1.0
    sharpness: float = 1.0
    factor: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def table(self, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Cosine and sine of every position, [2, positions, D / 2]; the angles are computed in fp64."""
        plane = torch.arange(self.width // 2, dtype=torch.float64, device=device)
        ramp = ((plane - self.low) / (self.high - self.low)).clamp(0, 1)
        frequency = self.theta ** (-2 * plane / self.width) * (1 - ramp + ramp / self.factor)
        angle = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * frequency
        return (torch.stack((angle.cos(), angle.sin())) * self.magnitude).to(dtype)


def yarn(keys: Mapping[str, Any], theta: float, width: int) -> Angles:
    """The angles of a config's rope_scaling of type yarn.

    Raises:
        KeyError: without its factor or original_max_position_embeddings.
    """
    factor, context = float(keys["factor"]), keys["original_max_position_embeddings"]
    planes = (
        width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (keys.get("beta_fast") or 32, keys.get("beta_slow") or 1)
    )
    low, high = planes
    if keys.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)

    def growth(scale: float) -> float:
        return 1 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0

    over_all, scale, magnitude = keys.get("mscale_all_dim"), keys.get("mscale"), keys.get("attention_factor")
    if magnitude is None:
        magnitude = growth(scale) / growth(over_all) if scale and over_all else growth(1)
    sharpness = growth(over_all) ** 2 if over_all else 1.0
    return Angles(theta, width, float(magnitude), sharpness, factor, low, high if high > low else low + 2**-10)
