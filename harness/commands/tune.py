"""`moe-harness tune`: find the fastest tile sizes of the Triton experts for a model on this GPU."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import CannotJudge, unknown

TUNER = "impls.triton.tune"  # found by name, as every implementation is


def tune(
    config: Annotated[str, typer.Option(help="The released model whose shapes are tuned.")] = "qwen3-30b-a3b",
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens, one entry each.")
    ] = "1,8,32,64,128,256,512,1024,4096,16384",
    ep_size: Annotated[int, typer.Option(help="Tune one rank's part of the experts under EP of this size.", min=1)] = 1,
    log: Annotated[Path, typer.Option(help="Timings so far; a stopped run goes on from here.")] = Path("tune.jsonl"),
    out: Annotated[Path | None, typer.Option(help="The tuned file; by default where it will be found.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that compile.", min=1)] = 8,
) -> None:
    """Time every candidate and write the tuned file; stop it at any time, it resumes from its log."""
    import torch

    from fixtures.configs import names, shape
    from harness.commands.bench import _counts

    if config not in names():
        raise unknown("config", config, names())
    counts = _counts(tokens)
    if not torch.cuda.is_available():
        raise CannotJudge("nothing was tuned: there is no CUDA device to time on")
    model = shape(config)
    configs = import_module("impls.triton.configs")
    wanted = configs.Shape(
        model.num_experts // ep_size, model.hidden_size, model.intermediate_size, model.top_k, element_size=2
    )
    import_module(TUNER).tune(wanted, counts, log, out, processes)
