"""`moe-harness generate`: a model from a folder continues prompts, and says how fast."""

import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.ranks import launch

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def generate(
    model: Annotated[Path, typer.Option("--model", "-m", help="A Hugging Face folder: config.json, *.safetensors.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A text; may be repeated.")] = None,
    ids: Annotated[list[str] | None, typer.Option(help="A prompt as token ids, 1,2,3; may be repeated.")] = None,
    impl: Annotated[str | None, typer.Option("--impl", "-i", help="What loads the model: any `load_model`.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens for each prompt.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the end of a text.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; the checkpoint's own.")] = None,
    tp: Annotated[int, typer.Option("--tp", help="Ranks that share the model, a GPU each.", min=1)] = 1,
    ep: Annotated[bool, typer.Option("--ep", help="Ranks hold whole experts, not columns of all of them.")] = False,
    dispatcher: Annotated[str | None, typer.Option(help="With --ep: how tokens come to experts.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write tokens and times here.")] = None,
    debug: options.Debug = False,
) -> None:
    """Continue prompts with a model: text as it comes for one, all at the end for several."""
    import torch

    options.writable(json_file)
    if not prompt and not ids:
        raise UsageError("nothing to continue: give --prompt TEXT or --ids 1,2,3")
    place = options.device_here(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks = spread(tp, ep, dispatcher)
    spec = impl or next(iter(registry.registered("model")))
    registry.find("model", spec)  # said at once where there is none
    if not model.is_dir():
        raise UsageError(f"there is no folder {model}, wanted a Hugging Face one: config.json, *.safetensors")
    kind = options.one_dtype(dtype or _own_dtype(model))
    tokenizer = _tokenizer(model) if prompt else _maybe_tokenizer(model)
    asked = [list(tokenizer(text)["input_ids"]) for text in prompt or ()] + [ids_of(text) for text in ids or ()]
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "ignore_eos": ignore_eos}
    layout = {"expert_parallel": True, **({"dispatcher": dispatcher} if dispatcher else {})} if ep else {}
    call = Generation(spec, str(model), place, kind, asked, settings, layout, ranks, debug)
    began = time.perf_counter()
    found, ready = _answers(call, tokenizer) if ranks == 1 else _answers_of_ranks(call, tokenizer)
    if found is None:  # torchrun's other ranks have nothing to tell
        return
    ended = time.perf_counter()
    count = sum(map(len, found))
    speed = f"{count} tokens in {ended - ready:.2f} s, {count / (ended - ready):.1f} tokens/s"
    over = f" over {ranks} ranks" if ranks > 1 else ""
    print(f"{speed} (loaded in {ready - began:.1f} s, {place}, {kind}{over})", file=sys.stderr)
    if json_file is not None:
        times = {"load_seconds": ready - began, "seconds": ended - ready, "tokens_per_second": count / (ended - ready)}
        json_file.write_text(json.dumps({"prompts": asked, "tokens": found, **times}, indent=1))


@dataclass(frozen=True)
class Generation:
    """What every rank is to do."""

    spec: str
    folder: str
    device: str
    dtype: str
    prompts: list[list[int]]
    settings: dict[str, Any]
    layout: dict[str, Any]  # expert_parallel and dispatcher, where they are asked for
    ranks: int
    debug: bool


def spread(tp: int, ep: bool, dispatcher: str | None) -> int:
    """The number of ranks; UsageError where options do not go together."""
    ranks = launch.under_torchrun() or tp
    if ep and ranks == 1:
        raise UsageError("--ep spreads experts over ranks, but there is one: give --tp N with N above 1")
    if dispatcher is not None and not ep:
        raise UsageError("--dispatcher is for experts that are spread over ranks: give --ep too")
    if tp not in (1, ranks):
        raise UsageError(f"--tp is {tp}, but torchrun has started {ranks} ranks: give the same number")
    return ranks


def _answers(call: Generation, tokenizer: Any) -> tuple[list, float]:
    """New tokens of every prompt, and when the model was loaded."""
    import torch

    load, dtype = registry.find("model", call.spec), getattr(torch, TORCH_NAMES[call.dtype])
    loaded = _load(load, Path(call.folder), call.device, dtype, call.debug)
    ready = time.perf_counter()
    return _continue(loaded, call.prompts, call.settings, tokenizer, call.debug), ready


def _answers_of_ranks(call: Generation, tokenizer: Any) -> tuple[list | None, float]:
    """The same from ranks that are started here, or that torchrun has started; None on those that say nothing."""
    if launch.under_torchrun():
        with launch.joined(call.device == "cuda") as me:
            found = answer_as_rank(me, call)
        if me.rank:
            return None, 0.0
        _print_all(found["tokens"], tokenizer)
        return found["tokens"], time.perf_counter() - found["seconds"]
    with launch.Launched(f"{__name__}:answer_as_rank", call, ranks=call.ranks, cuda=call.device == "cuda") as started:
        words = started.words()
        next(words)  # loaded
        ready = time.perf_counter()
        if len(call.prompts) == 1:
            return [_told(words, tokenizer)], ready
        for _ in words:
            pass
        found = started.results[0]["tokens"]
        _print_all(found, tokenizer)
        return found, ready


def answer_as_rank(me: launch.Member, call: Generation) -> dict[str, Any]:
    """One rank: load its part, say so, and continue all prompts; a single one's tokens are said as they come."""
    import torch

    load = registry.find("model", call.spec)
    device = f"cuda:{torch.cuda.current_device()}" if call.device == "cuda" else call.device
    given = {"device": device, "dtype": getattr(torch, TORCH_NAMES[call.dtype]), "group": me.group, **call.layout}
    model = refusing(lambda: load(call.folder, **given), call.debug)
    me.say("loaded")
    began = time.perf_counter()
    if len(call.prompts) == 1 and hasattr(model, "stream"):
        tokens = [refusing(lambda: _all(model.stream(call.prompts[0], **call.settings), me.say), call.debug)]
    else:
        tokens = refusing(lambda: model.generate(call.prompts, **call.settings), call.debug)
        for token in tokens[0] if len(tokens) == 1 else ():
            me.say(token)
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


def _all(stream: Iterable[int], say: Callable[[int], None]) -> list[int]:
    tokens = []
    for token in stream:
        tokens.append(token)
        say(token)
    return tokens


def _own_dtype(folder: Path) -> str:
    """The dtype that config.json names; bf16 where it names none, and where the loader will complain about the file."""
    try:
        keys = json.loads((folder / "config.json").read_text())
        return str(keys.get("dtype") or keys.get("torch_dtype") or "bf16")
    except (OSError, ValueError, AttributeError):
        return "bf16"


def ids_of(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--ids is {text!r}, but should be token ids such as 1,2,3") from None


def _tokenizer(folder: Path) -> Any:
    found = _maybe_tokenizer(folder)
    if found is None:
        raise UsageError(f"{folder} holds no tokenizer for texts that transformers can load; give ids with --ids 1,2,3")
    return found


def _maybe_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None without one, or where it is not the decoder's: the Omni talker speaks in codes."""
    try:
        kind = str(json.loads((folder / "config.json").read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        kind = ""  # the loader will say what is wrong with the file
    if kind.startswith("qwen3_omni_moe"):
        return None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CannotJudge("a text needs transformers: pip install 'moe-harness[transformers]'") from error
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _load(load: Callable, folder: Path, device: str, dtype: Any, debug: bool) -> Any:
    """The model, with a bar of bytes where the loader tells its progress; what it refuses is a wrong call."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        extra = {}
        if "progress" in inspect.signature(load).parameters:
            extra["progress"] = lambda done, total: bar.update(task, completed=done, total=total)
        return refusing(lambda: load(str(folder), device=device, dtype=dtype, **extra), debug)


def refusing(call: Callable[[], Any], debug: bool) -> Any:
    """What `call` gives; a ValueError or the like of the implementation becomes a message without a traceback."""
    try:
        return call()
    except (ValueError, TypeError, NotImplementedError, MemoryError, OSError) as error:
        if debug:
            raise
        raise UsageError(str(error)) from error


def _continue(model: Any, prompts: list[list[int]], settings: dict[str, Any], tokenizer: Any, debug: bool) -> list:
    """New tokens of every prompt, printed."""
    if len(prompts) == 1 and hasattr(model, "stream"):
        stream = refusing(lambda: model.stream(prompts[0], **settings), debug)
        return [_told(stream, tokenizer)]
    found = refusing(lambda: model.generate(prompts, **settings), debug)
    _print_all(found, tokenizer)
    return found


def _print_all(found: list[list[int]], tokenizer: Any) -> None:
    for place, tokens in enumerate(found):
        print(f"--- {place}" if len(found) > 1 else "", end="\n" if len(found) > 1 else "")
        print(_text(tokens, tokenizer))


def _told(stream: Iterable[int], tokenizer: Any) -> list[int]:
    """All tokens of a stream, printed as they come; Ctrl-C ends it, and what came is kept."""
    tokens: list[int] = []
    shown = ""
    try:
        for token in stream:
            tokens.append(token)
            text = _text(tokens, tokenizer)
            if not text.endswith("\ufffd"):  # half of a character
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr)
    print(_text(tokens, tokenizer)[len(shown) :])
    return tokens


def _text(tokens: list[int], tokenizer: Any) -> str:
    return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
