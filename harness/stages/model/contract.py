"""The signature of an implementation of the stage `model`."""

from typing import Any


def model(
    model_dir: str, *, device: str, dtype: Any, group: Any = None, expert_parallel: bool = False,
    dispatcher: str = "local_allreduce",
) -> Any: ...  # fmt: skip
