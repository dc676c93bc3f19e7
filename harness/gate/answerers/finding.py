"""From a spec to somebody who answers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from moe_harness.harness.core import contracts, registry
from moe_harness.harness.core.errors import CannotJudge, UsageError, unknown
from moe_harness.harness.gate.exchange import Answer, Request
from moe_harness.harness.gate.identity import source_hash

FAMILIES = ("transformers", "hflm")  # whose specs name an experts implementation of transformers
PLUGGED = ("model", "experts", "moe_block")  # stages whose implementations answer, in the order of preference
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Settings:
    """How an answerer runs; all of it is part of its identity.

    Attributes:
        model: the checkpoint's folder; None for a server.
        batch_size: questions at a time.
        tp, ep, dispatcher: of a model of the stage `model` over several ranks.
    """

    model: Path | None
    device: str = "cpu"
    dtype: str = "bf16"
    batch_size: int = 64
    tp: int = 1
    ep: int = 1
    dispatcher: str | None = None


class Answerer(Protocol):
    """Who answers.

    Attributes:
        traceable: whether `identity` names the source of what computes the answers, so that they may serve a later run.
    """

    traceable: bool

    def identity(self) -> dict[str, Any]:
        """All that its answers depend on besides the request."""
        ...

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer a batch; whatever is raised means that the implementation or the machine failed."""
        ...


def find(spec: str, settings: Settings) -> Answerer:
    """The answerer that `spec` names, loaded.

    Raises:
        UsageError: no such name, no checkpoint, settings that do not go together.
        CannotJudge: it exists and cannot be loaded.
    """
    if not needs_model(spec):
        from moe_harness.harness.gate.answerers.server import Server

        return Server(spec, settings)
    check_model(settings.model)
    if spec.partition(":")[0] in FAMILIES:
        _needs("transformers")
        name = spec.partition(":")[2]
        return _hflm(name, settings) if spec.startswith("hflm") else _transformers(spec, name, settings)
    stage, function, layer = resolve(spec)
    if stage == "model" and settings.tp * settings.ep > 1:
        from moe_harness.harness.gate.answerers.ranks import Ranks

        return Ranks(spec, settings)
    if stage == "model":
        from moe_harness.harness.gate.answerers.contract import ContractModel

        return ContractModel(spec, function, settings)
    _needs("transformers")
    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

    return TransformersModel(spec, settings, stage=stage, function=function, layer=layer)


def glance(spec: str, settings: Settings) -> None:
    """Refuse what can be refused before anybody is asked, without loading a model.

    Raises:
        UsageError: no such name or file, no checkpoint, a model that the server does not offer.
        CannotJudge: a server that does not answer.
    """
    if not needs_model(spec):
        find(spec, settings)
        return
    check_model(settings.model)
    plain, at, layer = spec.rpartition("@")
    name = plain if at and layer.isdigit() else spec
    first, _, second = name.partition(":")
    if first.endswith(".py") and not Path(first).is_file():
        raise UsageError(f"{name!r}: there is no file {first}")
    if first in FAMILIES:
        _needs("transformers")
        if second not in ("", "eager") and not _in_its_table(second):
            _experts_name(second)
    elif first not in FAMILIES and not second:
        stage_of_name(name)


def needs_model(spec: str) -> bool:
    """Whether a checkpoint's folder is needed: not for a server, which has one."""
    return not spec.startswith(("http://", "https://"))


def check_model(folder: Path | None) -> None:
    """Refuse a folder that holds no checkpoint (UsageError)."""
    if folder is None or not (folder / "config.json").is_file():
        got = "nothing" if folder is None else f"{folder}, which has no config.json"
        raise UsageError(f"--model is {got}, but should be a folder with config.json, *.safetensors and tokenizer.json")
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"--model is {folder}, which has no *.safetensors")


def resolve(spec: str) -> tuple[str, Callable[..., Any], int | None]:
    """Stage, function and layer of a spec; the stage is told by the name, or by the function's arguments."""
    plain, at, layer = spec.rpartition("@")
    if at and layer.isdigit():
        return (*resolve(plain)[:2], int(layer))
    stage = stage_of_name(spec)
    if stage is not None:
        return stage, registry.find(stage, spec), None
    function = registry.find("experts", spec)
    if not callable(function):
        raise UsageError(f"{spec!r} is {type(function).__name__}, but should be a function")
    return _stage_of(spec, function), function, None


def stage_of_name(spec: str) -> str | None:
    """The stage of a registered name; None for what is to be imported; UsageError for a name that nobody has."""
    for stage in PLUGGED:
        if spec in registry.registered(stage):
            return stage
    if ":" not in spec:
        known = [name for stage in PLUGGED for name in registry.registered(stage)]
        raise unknown("implementation", spec, [*known, "transformers:eager"])
    return None


def _stage_of(spec: str, function: Callable[..., Any]) -> str:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return "experts"
    if names[:1] == ["model_dir"]:
        return "model"
    if names[:3] == ["hidden_states", "weights", "config"]:
        return "moe_block"
    if "top_k_index" in names:
        return "hook"
    if len(names) >= 5 or any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values()):
        return "experts"
    raise UsageError(
        f"{spec!r} takes ({', '.join(names)}), which is no stage that the gate can put into a model: wanted are\n"
        f"  experts{contracts.SIGNATURES['experts']}\n  moe_block{contracts.SIGNATURES['moe_block']}\n"
        "  load_model(model_dir, *, device, dtype, ...)\n"
        "  transformers' (self, hidden_states, top_k_index, top_k_weights)"
    )


def _transformers(spec: str, name: str, settings: Settings) -> Answerer:
    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

    return TransformersModel(spec, settings, implementation=_experts_name(name))


def _hflm(name: str, settings: Settings) -> Answerer:
    from moe_harness.harness.gate.answerers.hflm import Hflm

    return Hflm(_experts_name(name or "eager"), settings)


def _in_its_table(name: str) -> bool:
    """Whether transformers' source names this implementation: importing it to look takes 4 s of the processor."""
    package = find_spec("transformers")
    table = Path((package and package.origin) or "").parent / "integrations" / "moe.py"
    return table.is_file() and f'    "{name}": ' in table.read_text("utf-8")


def _experts_name(name: str) -> str:
    """A name that transformers knows, registered first where an implementation of ours brings it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    known = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if name in known:
        return name
    ours = {}
    for registered in registry.registered("hf"):
        family, _, attribute = registered.partition(":")
        if attribute == "NAME":
            try:
                ours[registry.find("hf", registered)] = family
            except CannotJudge:  # a library that is not installed here
                continue
    if name in ours:
        registry.find("hf", f"{ours[name]}:register")()
        return name
    raise unknown("experts implementation of transformers", name, sorted({*known, *ours}))


def registered_source(name: str) -> str | None:
    """The source behind an experts implementation of transformers; None for transformers' own, which has a version."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return None if name == "eager" else source_hash(ALL_EXPERTS_FUNCTIONS[name])


def _needs(package: str) -> None:
    if find_spec(package) is None:
        raise CannotJudge(f"this needs {package}: pip install 'moe-harness[{package}]'")
