"""`moe-harness tune`: find the fastest tile sizes of the Triton experts for a model on this GPU."""

from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.commands.bench import TOKENS, check_ep_size, one_format, token_counts
from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import CannotJudge, UsageError


def tune(
    impl: Annotated[
        str, typer.Option("--impl", help="The library whose kernels are tuned; with --format also library:function.")
    ] = "triton",
    config: Annotated[str, typer.Option(help="The released model whose shapes are tuned.")] = "qwen3-30b-a3b",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, one entry each.")] = TOKENS,
    format: Annotated[
        str, typer.Option(help="Tune the quantised experts for weights in this format instead of those in 16 bits.")
    ] = "",
    ep_size: Annotated[int, typer.Option(help="Tune one rank's part of the experts under EP of this size.", min=1)] = 1,
    log: Annotated[Path, typer.Option(help="Timings so far; a stopped run goes on from here.")] = Path("tune.jsonl"),
    out: Annotated[Path | None, typer.Option(help="The tuned file; by default where it will be found.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that compile.", min=1)] = 8,
) -> None:
    """Time every candidate and write the tuned file; stop it at any time, it resumes from its log."""
    import torch

    from moe_harness.fixtures.configs import names, shape

    library, _, function = impl.partition(":")
    if function and not format:
        raise UsageError(f"--impl is {impl!r}, but should be a library, such as {library!r}, unless --format is given")
    tuner = registry.companion(library, "tune_quantized" if format else "tune")
    options_of_format = {"format": one_format("quantized_experts", format), "function": function} if format else {}
    counts, model = token_counts(tokens), shape(options.one_of("config", config, names()))
    check_ep_size(model.num_experts, ep_size)
    for path in (log, out):
        options.writable(path)
    if not torch.cuda.is_available():
        raise CannotJudge("nothing was tuned: there is no CUDA device to time on")
    layer = (model.num_experts // ep_size, model.hidden_size, model.intermediate_size, model.top_k)
    try:
        tuner.tune_layer(*layer, counts, log, out, processes, **options_of_format)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        known = len(log.read_text().splitlines()) if log.exists() else 0
        raise CannotJudge(f"stopped: {known} timings are in {log}, and the same command goes on from there") from None
