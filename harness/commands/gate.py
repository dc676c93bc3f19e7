"""`moe-harness gate`: the same questions to two implementations of a model, and one statistical verdict."""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, EXIT_FAIL, EXIT_PASS, CannotJudge, UsageError

app = typer.Typer(help="Put the same questions to two implementations and judge whether the candidate answers worse.",
                  no_args_is_help=True)  # fmt: skip

Task = Annotated[str, typer.Option("--task", help="arithmetic, gsm8k, or another of lm-eval's that generates text.")]
Data = Annotated[Path | None, typer.Option("--data", help="A folder with train.jsonl and test.jsonl, as GSM8K.")]
Limit = Annotated[int | None, typer.Option("--limit", help="So many questions, drawn by the seed; all.", min=1)]
Shots = Annotated[int | None, typer.Option("--shots", help="Examples before each question; the task's own.", min=0)]
Longest = Annotated[int | None, typer.Option("--max-new-tokens", help="Cut answers off there; the task's own.", min=1)]
Model = Annotated[Path | None, typer.Option("--model", help="The checkpoint's folder; none for a server.")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32, fp16, bf16.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Questions at a time.", min=1)]
Margin = Annotated[float, typer.Option("--margin", help="A fall of accuracy that is accepted.", min=0.0001, max=0.9999)]
Folder = Annotated[Path | None, typer.Option("--ledger", help="Keep answers in this folder; the user's cache.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ask again what the ledger has.")]
Seconds = Annotated[float, typer.Option("--timeout", help="Seconds that one batch may take.", min=1)]
Tp = Annotated[int, typer.Option("--tp", help="Ranks that share each expert, for a model that runs on several.", min=1)]
Ep = Annotated[int, typer.Option("--ep", help="Ranks that share the experts among them.", min=1)]
Dispatcher = Annotated[str | None, typer.Option("--dispatcher", help="The dispatcher that --ep runs with.")]
Against = Annotated[
    Path | None, typer.Option("--against", help="Compare the candidate with its recorded run, document by document.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")]


@app.callback(invoke_without_command=True)
def gate(
    context: typer.Context,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Who is trusted: transformers:eager, ...")] = None,
    candidate: Annotated[str | None, typer.Option("--candidate", help="Who is judged.")] = None,
    model: Model = None,
    task: Task = "gsm8k",
    data: Data = None,
    limit: Limit = None,
    shots: Shots = None,
    max_new_tokens: Longest = None,
    device: options.Device = "cpu",
    dtype: Dtype = "bf16",
    batch_size: Batch = 64,
    tp: Tp = 1,
    ep: Ep = 1,
    dispatcher: Dispatcher = None,
    margin: Margin = 0.02,
    seed: options.Seed = 0,
    ledger: Folder = None,
    fresh: Fresh = False,
    timeout: Seconds = 1800.0,
    against: Against = None,
    json: Json = None,
    html: Html = None,
    debug: options.Debug = False,
) -> None:
    """Ask, answer and judge in one go; an interrupted run goes on where it stopped.

    Specs: `transformers:NAME` (eager, grouped_mm, moe_harness_triton, ...), an implementation of the stages experts or
    moe_block (`triton`, `kernel.py:experts`; `SPEC@3` in layer 3 alone), of the stage model (`qwen3_moe`),
    `hflm:NAME`, or a server, `http://host:port/v1#model`.
    """
    if context.invoked_subcommand is not None:
        return
    if baseline is None or candidate is None:
        raise UsageError("wanted are --baseline SPEC and --candidate SPEC (and --model DIR)")
    _outputs(json, html)
    options.readable(against, "--against")
    device, dtype = _where(device, dtype)
    _spread(ep, dispatcher)
    from moe_harness.harness.gate import steps
    from moe_harness.harness.gate.answerers import Settings, glance
    from moe_harness.harness.gate.task import Asked

    for spec in (baseline, candidate):
        glance(spec, Settings(model, device, dtype, batch_size))
    asked = Asked(task, None if data is None else str(data), limit, shots, seed, max_new_tokens)
    with tempfile.TemporaryDirectory(prefix="accuracy-gate-") as folder:
        requests = Path(folder) / "requests.jsonl"
        steps.make_requests(asked, requests)
        answers = {side: Path(folder) / f"{side}.jsonl" for side in ("baseline", "candidate")}
        # The candidate first: where it fails, nobody has waited for the baseline.
        for side, spec in (("candidate", candidate), ("baseline", baseline)):
            shared = [
                "--device", device, "--dtype", dtype, "--batch-size", str(batch_size), "--timeout", str(timeout),
                *([] if model is None else ["--model", str(model)]), *(["--fresh"] if fresh else []),
                *([] if ledger is None else ["--ledger", str(ledger)]),
            ]  # fmt: skip
            ranks = ["--tp", str(tp), "--ep", str(ep), *([] if dispatcher is None else ["--dispatcher", dispatcher])]
            ranked = ranks if side == "candidate" else []
            steps.answer_in_a_process(
                [str(requests), "--impl", spec, *shared, *ranked], answers[side], f"the {side} {spec}"
            )
        result = steps.make_result(requests, answers["baseline"], answers["candidate"], margin)
    _deliver(result, json, html, against)


@app.command()
def requests(
    out: Annotated[Path, typer.Option("--out", help="The questions are written here, as JSON lines.")],
    task: Task = "gsm8k",
    data: Data = None,
    limit: Limit = None,
    shots: Shots = None,
    max_new_tokens: Longest = None,
    seed: options.Seed = 0,
) -> None:
    """Step 1 of 3, where lm-eval is: write the questions."""
    options.writable(out)
    from moe_harness.harness.gate import steps
    from moe_harness.harness.gate.task import Asked

    asked = Asked(task, None if data is None else str(data.absolute()), limit, shots, seed, max_new_tokens)
    print(f"{steps.make_requests(asked, out)} questions in {out}")


@app.command()
def answer(
    requests: Annotated[Path, typer.Argument(help="What `gate requests` wrote.")],
    impl: Annotated[str, typer.Option("--impl", "-i", help="Who answers.")],
    out: Annotated[Path, typer.Option("--out", help="The answers are written here, as JSON lines.")],
    model: Model = None,
    device: options.Device = "cpu",
    dtype: Dtype = "bf16",
    batch_size: Batch = 64,
    tp: Tp = 1,
    ep: Ep = 1,
    dispatcher: Dispatcher = None,
    ledger: Folder = None,
    fresh: Fresh = False,
    timeout: Seconds = 1800.0,
    lifeline: Annotated[int | None, typer.Option(hidden=True, help="End when this pipe does.")] = None,
    debug: options.Debug = False,
) -> None:
    """Step 2 of 3, where the engine is (no lm-eval needed): write the answers of one implementation."""
    if lifeline is not None:
        from multiprocessing.connection import Connection

        from moe_harness.harness.process.parent_watch import end_with

        end_with(Connection(lifeline, writable=False))
    options.writable(out)
    device, dtype = _where(device, dtype)
    _spread(ep, dispatcher)
    from moe_harness.harness.gate import steps
    from moe_harness.harness.gate.answerers import Settings
    from moe_harness.harness.gate.progress import Answered

    settings = Settings(model, device, dtype, batch_size, tp, ep, dispatcher)
    with Answered(impl) as told:
        steps.make_answers(
            requests, impl, settings, ledger or steps.ledger_folder(), out, fresh=fresh, timeout=timeout, told=told
        )


@app.command("judge")
def judge_(
    requests: Annotated[Path, typer.Argument(help="What `gate requests` wrote.")],
    baseline: Annotated[Path, typer.Argument(help="The baseline's answers.")],
    candidate: Annotated[Path, typer.Argument(help="The candidate's answers.")],
    margin: Margin = 0.02,
    json: Json = None,
    html: Html = None,
) -> None:
    """Step 3 of 3, where lm-eval is: score both and judge."""
    _outputs(json, html)
    from moe_harness.harness.gate import steps

    _deliver(steps.make_result(requests, baseline, candidate, margin), json, html)


def _where(device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype, as they are written in settings."""
    from moe_harness.harness.core import contracts

    device, dtype = options.one_of("device", device, contracts.DEVICES), options.one_dtype(dtype)
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise CannotJudge("no CUDA device here, which --device cuda asks for; `gate requests`, `gate answer` and "
                              "`gate judge` do it in three steps on two machines")  # fmt: skip
    return device, dtype


def _spread(ep: int, dispatcher: str | None) -> None:
    """Refuse a dispatcher that would have nothing to do (UsageError)."""
    if dispatcher is not None and ep == 1:
        raise UsageError(
            f"--dispatcher {dispatcher} moves tokens to experts on other ranks: give --ep N, N above 1, too"
        )


def _outputs(json: Path | None, html: Path | None) -> None:
    for path in (json, html):
        options.writable(path)


def _deliver(result: dict[str, Any], json: Path | None, html: Path | None, recorded: Path | None = None) -> None:
    from json import dumps

    from rich.console import Console

    from moe_harness.harness.gate import view

    result["command"] = "moe-harness " + shlex.join(sys.argv[1:])
    view.show(result, Console())
    if json is not None:
        json.write_text(dumps(result, indent=1) + "\n", "utf-8")
    if html is not None:
        view.write_html(result, html)
    status = {"pass": EXIT_PASS, "fail": EXIT_FAIL}.get(result["verdict"], EXIT_CANNOT_JUDGE)
    if recorded is not None:
        from moe_harness.harness.record.against import against

        status = against(recorded, result, status)
    raise typer.Exit(status)
