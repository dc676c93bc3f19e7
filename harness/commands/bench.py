"""`moe-harness bench`: time implementations side by side against the floor, in one run on one GPU."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, EXIT_PASS, CannotJudge, UsageError
from moe_harness.harness.core.registry import needed_part, stages_with

TOKENS = "1,8,32,64,128,256,512,1024,4096,16384"
STAGES = (*stages_with("bench"), "model")
DTYPES = ("bf16", "fp16", "fp32")


def bench(
    stage: Annotated[
        str, typer.Option("--stage", "-s", help=", ".join(STAGES), autocompletion=options.starting_with(lambda: STAGES))
    ],
    impl: Annotated[
        list[str],
        typer.Option(
            "--impl",
            "-i",
            help="What is timed; ratios are to the first.",
            autocompletion=options.starting_with(options.implementations),
        ),
    ],
    config: Annotated[str, typer.Option(help="The released model whose shapes are used.")] = "qwen3-30b-a3b",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = TOKENS,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    format: Annotated[str, typer.Option(help="How the weights are shipped, for the stage quantized_experts.")] = "",
    ep_size: Annotated[int, typer.Option(help="Time one rank's part of the experts under EP of this size.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds; the median and the spread are over these.", min=3)] = 11,
    seed: Annotated[int, typer.Option(help="Other data.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Write roofline and times here, PNG or SVG.")
    ] = None,
    baseline: options.Baseline = None,
    model_dir: Annotated[Path | None, typer.Option("--model", help="The checkpoint, for the stage model.")] = None,
    device: Annotated[str, typer.Option(help="cuda; for the stage model cpu, too.")] = "cuda",
    requests: Annotated[int, typer.Option(help="Requests of the stage model.", min=1)] = 256,
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of a prompt, least and most.")] = "100-1024",
    new_tokens: Annotated[str, typer.Option(help="Tokens of an answer, least and most.")] = "100-1024",
    runs: Annotated[int, typer.Option(help="Runs of a model after the first one, which warms up.", min=1)] = 5,
) -> None:
    """Time implementations of a stage; one that is not right on the timed data is not timed."""
    from rich.console import Console

    from moe_harness.fixtures.configs import names, shape

    stage = options.one_of("stage", stage, STAGES)
    dtype = options.one_dtype(dtype)
    if stage == "model":
        from moe_harness.harness.commands.bench_model import bench_model

        options.writable(json)
        bench_model(
            list(options.specs(impl)), model_dir, options.one_of("device", device, ("cuda", "cpu")), dtype, requests,
            (prompt_tokens, new_tokens), runs, seed, json, "moe-harness " + shlex.join(sys.argv[1:]),
        )  # fmt: skip
    counts, model = token_counts(tokens), shape(options.one_of("config", config, names()))
    check_ep_size(model.num_experts, ep_size)
    format = one_format(stage, format)
    for path in (json, picture):
        options.writable(path)
    options.readable(baseline)
    _require(picture)
    from moe_harness.harness.bench import timing as library
    from moe_harness.harness.bench.data import TimedLayer
    from moe_harness.harness.bench.pictures import legend, remarks, table
    from moe_harness.harness.bench.pictures import picture as draw

    try:
        report = library.bench(
            stage, list(options.specs(impl)), TimedLayer(model, ep_size, format), counts,
            dtype=dtype, rounds=rounds, seed=seed,
            command="moe-harness " + shlex.join(sys.argv[1:]),
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    except RuntimeError as error:
        raise CannotJudge(f"nothing was timed: {error}") from error
    console = Console()
    console.print(legend(report), table(report), sep="\n", highlight=False, markup=False)
    for remark in remarks(report):
        console.print(remark, highlight=False, markup=False)
    if json is not None:
        json.write_text(report.as_json())
    if picture is not None:
        draw(report, picture)
    if report.stopped:
        raise CannotJudge(f"only what is listed was timed: {report.stopped}")
    timed = any(not timing.refused for timing in report.timings)
    status = EXIT_PASS if timed else EXIT_CANNOT_JUDGE
    if baseline is not None:
        from json import loads

        from moe_harness.harness.record.against import against

        status = against(baseline, loads(report.as_json()), status)
    raise typer.Exit(status)


def token_counts(text: str) -> list[int]:
    """The numbers of --tokens.

    Raises:
        UsageError: anything but positive whole numbers.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"--tokens is {text!r}, but should be positive numbers such as 1,64,1024")
    return counts


def one_format(stage: str, format: str) -> str:
    """The format of --format, the stage's first one where none is given (UsageError for one that it has not)."""
    contract = needed_part(stage, "contract")
    known = getattr(contract, "DECLARATIONS", {}).get("formats", ())
    if not known:
        if format:
            raise UsageError(f"--format is {format!r}, but the stage {stage} has weights of one kind only")
        return ""
    return options.one_of("format", format or contract.BENCHED, known)


def check_ep_size(experts: int, ep_size: int) -> None:
    """Refuse a number of ranks that cannot share the experts evenly (UsageError)."""
    if experts % ep_size:
        raise UsageError(f"--ep-size is {ep_size}, but should divide the model's {experts} experts")


def _require(picture: Path | None) -> None:
    """Find out before the run, not after it, that nothing can be timed or drawn."""
    import torch

    if not torch.cuda.is_available():
        raise CannotJudge("nothing was timed: there is no CUDA device to time on")
    if picture is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise CannotJudge("a picture needs matplotlib: pip install matplotlib") from error
