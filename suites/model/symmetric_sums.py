"""Our engine over ranks with its sums in symmetric memory, whose kernel is interpreted: judged as a stranger's is."""

from typing import Any

import pytest

from moe_harness.impls.qwen3_moe import model as engine
from moe_harness.suites.reduction.interpreted import SumNorm


def load_model(model_dir: str, *, device: str, dtype: Any, group: Any = None, expert_parallel: bool = False) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "symmetric_sums", lambda ranks, demanded: SumNorm(ranks.group))
        return engine.load_model(
            model_dir, device=device, dtype=dtype, group=group, expert_parallel=expert_parallel, symmetric=True
        )
