"""Somebody else's comparison under test: which standard wrong outputs would their shapes, scales and tolerance accept?

A test is described by a file (TOML, JSON or YAML) with the shapes, the standard deviation of each input, the dtype, and
the rule by which it compares `got` with `want`:

    allclose      |got - want| <= atol + rtol |want|, everywhere             atol, rtol
    percentage    the same for that share of the elements                     atol, rtol, share, relative_to
    cosine        1 - cos(got, want) <= threshold                             threshold
    calc_diff     1 - 2 <got, want> / (|got|^2 + |want|^2) < threshold        threshold
    frobenius     |got - want| / |want| <= threshold                          threshold
    twice_eager   max |got - fp32| <= factor max |eager - fp32| + atol        factor, atol

`want` is what the test itself takes as right: the layer computed eagerly in its dtype ("same_dtype"), or in fp32 and
rounded once ("fp32").  The wrong outputs are those of `harness.core.stage`, on the very same inputs.  A shape
may name input scales of its own (`inputs = {hidden_states = 0}`), for a variant of the test on other data.
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import contracts
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.errors import UsageError, unknown
from moe_harness.harness.stages.experts import wrong as experts_wrong
from moe_harness.harness.stages.grouped_linear import wrong as linear_wrong
from moe_harness.reference.experts import activate, routed_rows
from moe_harness.reference.grouped_linear import row_experts

RULES: dict[str, tuple[str, ...]] = {
    "allclose": ("atol", "rtol"),
    "percentage": ("atol", "rtol", "share"),
    "cosine": ("threshold",),
    "calc_diff": ("threshold",),
    "frobenius": ("threshold",),
    "twice_eager": ("factor", "atol"),
}
REFERENCES = ("same_dtype", "fp32")
STAGES = {
    "experts": (("hidden_states", "gate_up_proj", "down_proj", "router_logits"), ("T", "H", "I", "E", "k")),
    "grouped_linear": (("x", "weight"), ("S", "K", "N", "E")),
}


@dataclass(frozen=True)
class Audit:
    """A test as its file describes it."""

    name: str
    rule: dict[str, Any]
    inputs: dict[str, float]  # standard deviations
    shapes: list[dict[str, Any]]  # sizes; "inputs" where the scales differ
    dtype: str = "bf16"
    stage: str = "experts"
    reference: str = "same_dtype"
    activation: str = "silu"
    renormalize: bool = False
    source: list[str] = field(default_factory=list)
    note: str = ""
    seed: int = 0


# ----------------------------------------------------------------------------------------------------------- the files


def builtin() -> dict[str, Path]:
    """Name -> file of the tests that are described here."""
    from moe_harness import fixtures

    folder = Path(str(fixtures.__file__)).parent / "audits"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read(test: str) -> Audit:
    """The test of a file or of a built-in name.

    Raises:
        UsageError: neither; not readable; a field that is unknown, missing or of the wrong kind.
    """
    path = builtin().get(test, Path(test))
    if not path.is_file():
        looks_like_a_file = path.suffix or "/" in test
        raise UsageError(f"{test} does not exist") if looks_like_a_file else unknown("test", test, list(builtin()))
    try:
        found = _parse(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as {path.suffix or 'TOML'}: {error}") from error
    return checked(found, str(path))


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix not in (".yaml", ".yml"):
        return tomllib.loads(text)
    try:
        import yaml
    except ImportError:
        raise UsageError(
            f"{path}: reading YAML needs PyYAML, which is not installed; write it as TOML or JSON"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def checked(found: Any, where: str) -> Audit:
    """`found` as an Audit, or a UsageError that says what should stand where."""
    if not isinstance(found, dict):
        raise UsageError(f"{where} holds {type(found).__name__}, but should hold the fields of one test")
    known = [f.name for f in fields(Audit)]
    for name in found:
        if name not in known:
            raise UsageError(f"{where}: {unknown('field', name, known)}")
    for name in ("name", "rule", "inputs", "shapes"):
        if name not in found:
            raise UsageError(f"{where} lacks the field {name!r}")
    audit = Audit(**found)
    _one_of(where, "stage", audit.stage, list(STAGES))
    _one_of(where, "dtype", audit.dtype, list(contracts.DTYPES))
    _one_of(where, "reference", audit.reference, list(REFERENCES))
    _check_rule(where, audit.rule)
    scales, sizes = STAGES[audit.stage]
    _numbers(where, "inputs", audit.inputs, scales, (int, float))
    if not isinstance(audit.shapes, list) or not audit.shapes:
        raise UsageError(f"{where}: shapes is {audit.shapes!r}, but should be a list of {', '.join(sizes)}")
    for shape in audit.shapes:
        if not isinstance(shape, dict):
            raise UsageError(f"{where}: shapes holds {shape!r}, but should hold tables of {', '.join(sizes)}")
        _numbers(where, "shapes", {name: size for name, size in shape.items() if name != "inputs"}, sizes, (int,))
        _numbers(where, "inputs of a shape", _scales(audit, shape), scales, (int, float))
        if shape.get("k", 1) > shape["E"]:
            raise UsageError(f"{where}: k is {shape['k']}, but should be at most E, which is {shape['E']}")
    return audit


def _one_of(where: str, name: str, value: Any, known: list[str]) -> None:
    if value not in known:
        raise UsageError(f"{where}: {unknown(name, str(value), known)}")


def _check_rule(where: str, rule: Any) -> None:
    if not isinstance(rule, dict) or "kind" not in rule:
        raise UsageError(f"{where}: rule should be a table with the field 'kind', one of {', '.join(RULES)}")
    _one_of(where, "rule", rule["kind"], list(RULES))
    rest = {k: v for k, v in rule.items() if k not in ("kind", "relative_to")}
    _numbers(where, f"rule {rule['kind']}", rest, RULES[rule["kind"]], (int, float))
    if rule.get("relative_to", "want") not in ("want", "got"):
        raise UsageError(f"{where}: relative_to is {rule['relative_to']!r}, but should be 'want' or 'got'")


def _numbers(where: str, what: str, found: Any, names: tuple[str, ...], kinds: tuple[type, ...]) -> None:
    if not isinstance(found, dict) or set(found) != set(names):
        given = ", ".join(found) if isinstance(found, dict) else repr(found)
        raise UsageError(f"{where}: {what} has {given or 'nothing'}, but should have {', '.join(names)}")
    whole = kinds == (int,)
    for name, value in found.items():
        if type(value) not in kinds or value < (1 if whole else 0):
            wanted = "a whole number above 0" if whole else "a number, 0 or above"
            raise UsageError(f"{where}: {name} in {what} is {value!r}, but should be {wanted}")


# ------------------------------------------------------------------------------------------------------------ the audit


@dataclass
class Data:
    """One shape: what is compared."""

    wrong: dict[str, Tensor]  # fp64
    fused: Tensor  # a right kernel: fp32 sums, one rounding inside
    eager: Tensor  # another: every intermediate rounded to the dtype
    fp32: Tensor


def run(audit: Audit) -> dict[str, Any]:
    """What the rule accepts, per shape, as plain data."""
    shapes = [_audit_shape(audit, shape) for shape in audit.shapes]
    return {
        "schema": 1, "name": audit.name, "stage": audit.stage, "dtype": audit.dtype, "rule": audit.rule,
        "reference": audit.reference, "inputs": audit.inputs, "source": audit.source, "note": audit.note,
        "shapes": shapes,
    }  # fmt: skip


def _scales(audit: Audit, shape: dict[str, Any]) -> Any:
    """The standard deviation of each input for this shape."""
    own = shape.get("inputs", {})
    return audit.inputs | own if isinstance(own, dict) else own


def _audit_shape(audit: Audit, shape: dict[str, Any]) -> dict[str, Any]:
    data = _MAKERS[audit.stage](audit, shape)
    dtype = DTYPES[audit.dtype]
    want = data.eager if audit.reference == "same_dtype" else data.fp32.to(dtype)
    verdicts = {name: accepts(audit.rule, out.to(dtype), want, data) for name, out in data.wrong.items()}
    return {
        "shape": shape,
        "accepted": [name for name, accepted in verdicts.items() if accepted],
        "rejected": [name for name, accepted in verdicts.items() if not accepted],
        "right_passes": accepts(audit.rule, data.fused, want, data),
        "largest_output": round(float(data.fp32.abs().max()), 6),
    }


def accepts(rule: dict[str, Any], got: Tensor, want: Tensor, data: Data) -> bool:
    """Whether the rule takes `got` for right."""
    a, b = got.double(), want.double()
    match rule["kind"]:
        case "allclose":
            return bool(((a - b).abs() <= rule["atol"] + rule["rtol"] * b.abs()).all())
        case "percentage":
            scale = a if rule.get("relative_to") == "got" else b
            close = (a - b).abs() <= rule["atol"] + rule["rtol"] * scale.abs()
            return float(close.double().mean()) >= rule["share"]
        case "cosine":  # a zero vector has no direction: torch.cosine_similarity calls it 0
            norms = float(a.norm() * b.norm())
            return 1 - (float((a * b).sum()) / norms if norms else 0.0) <= rule["threshold"]
        case "calc_diff":
            squares = float((a * a + b * b).sum())
            return squares == 0 or 1 - 2 * float((a * b).sum()) / squares < rule["threshold"]
        case "frobenius":
            return float((a - b).norm()) <= rule["threshold"] * float(b.norm())
        case _:
            exact = data.fp32.double()
            allowed = rule["factor"] * float((data.eager.double() - exact).abs().max()) + rule["atol"]
            return float((a - exact).abs().max()) <= allowed


def _experts(audit: Audit, shape: dict[str, Any]) -> Data:
    tokens, width, inner, experts, top_k = (shape[n] for n in ("T", "H", "I", "E", "k"))
    draw = _normal(audit, _scales(audit, shape))
    hidden = draw("hidden_states", tokens, width)
    gate_up, down = draw("gate_up_proj", experts, 2 * inner, width), draw("down_proj", experts, width, inner)
    scores = draw("router_logits", tokens, experts).float().softmax(-1)
    plain, ids = scores.topk(top_k)
    normal = plain / plain.sum(-1, keepdim=True)
    weights, flipped = (normal, plain) if audit.renormalize else (plain, normal)
    layer = experts_wrong.Parts(
        hidden.double(), gate_up, down, weights.double(), ids, audit.activation, flipped.double()
    )
    call = (hidden, gate_up, down, weights, ids, audit.activation)
    eager, fused, fp32 = (_layer(*call, inside, sums) for inside, sums in _roundings(hidden.dtype))
    return Data(experts_wrong.experts(layer), fused.to(hidden.dtype), eager, fp32)


def _roundings(dtype: torch.dtype) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """(dtype of the activation, dtype of products and sums): eager, a fused kernel, fp32 throughout."""
    return (dtype, dtype), (dtype, torch.float32), (torch.float32, torch.float32)


def _layer(
    hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor,
    activation: str, inside: torch.dtype, sums: torch.dtype,
) -> Tensor:  # fmt: skip
    out = torch.zeros(hidden.shape, dtype=sums)
    for expert, tokens, slots in routed_rows(ids):
        gate, up = (hidden[tokens].to(sums) @ gate_up[expert].to(sums).T).chunk(2, dim=-1)
        activated = (activate(gate, activation) * up).to(inside).to(sums)
        rows = activated @ down[expert].to(sums).T
        out.index_add_(0, tokens, weights[tokens, slots, None].to(sums) * rows)
    return out


def _grouped_linear(audit: Audit, shape: dict[str, Any]) -> Data:
    rows, terms, columns, experts = (shape[n] for n in ("S", "K", "N", "E"))
    draw = _normal(audit, _scales(audit, shape))
    x, weight = draw("x", rows, terms), draw("weight", experts, columns, terms)
    sizes = torch.full((experts,), rows // experts)
    sizes[-1] += rows - int(sizes.sum())
    owners = row_experts(sizes)
    eager = torch.cat([x[owners == e] @ weight[e].T for e in range(experts)])
    fp32 = torch.cat([x[owners == e].float() @ weight[e].float().T for e in range(experts)])
    return Data(linear_wrong.linear(x, weight, sizes, bias=None), fp32.to(x.dtype), eager, fp32)


def _normal(audit: Audit, scales: dict[str, float]) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(audit.seed)

    def draw(name: str, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * scales[name]).to(DTYPES[audit.dtype])

    return draw


_MAKERS: dict[str, Callable[[Audit, dict[str, Any]], Data]] = {"experts": _experts, "grouped_linear": _grouped_linear}
