"""What an implementation of the stage `shared_expert_gate` stores, and how it sums."""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis.probing import BITS, Sum, first_column, split_terms
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase

FEW_BORDERLINE = 2  # of 64 products, those that an fp32 sigmoid's own error may round the other way
HIDES_OPERANDS = True  # a sigmoid hides all but a few bits of its argument


def products(trial: Trial, dtype: str) -> dict[str, Sum]:
    """The sums of the product."""
    return {"the product": lambda rows: _gate_sums(trial, dtype, rows)}


def stores(trial: Trial, dtype: str) -> dict[str, bool]:
    """Whether the logit and the gate are stored in `dtype`, as far as it could be decided."""
    return _store_of_logit(trial, dtype) | _store_of_gate(trial, dtype)


def _gate_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    """The logit, read back from its sigmoid; the sums asked about are small whole numbers."""
    x, weight = split_terms(rows)
    gate = _run_gate(trial, dtype, x, weight, 1.0)
    return None if gate is None else (gate / (1 - gate)).log().round()


def _store_of_logit(trial: Trial, dtype: str) -> dict[str, bool]:
    """logit = -16 - d, d half an ulp: where it is stored, the gate, about exp(logit), is larger by the factor 1 + d."""
    half = 2.0 ** (4 - BITS[dtype])
    x = torch.tensor([[-16.0, -half], [-16.0, 0.0]])
    got = _run_gate(trial, dtype, torch.nn.functional.pad(x, (0, 14)), torch.ones(16), 2.0**14)
    if got is None or not bool((got > 0).all()):
        return {}
    return {"logit": bool(got[0] == got[1])}


def _store_of_gate(trial: Trial, dtype: str) -> dict[str, bool]:
    """Three times the gate, rounded once or twice: which of the two every one of 64 gates agrees with."""
    logits = torch.arange(-32, 32) / 16
    got = _run_gate(trial, dtype, torch.nn.functional.pad(logits[:, None], (0, 15)), torch.ones(16), 3.0)
    if got is None:
        return {}
    gate, kind = logits.double().sigmoid(), DTYPES[dtype]
    once, twice = ((3 * g.double()).to(kind).double() for g in (gate, gate.to(kind)))
    wrong = {True: int((got != twice).sum()), False: int((got != once).sum())}
    stored = wrong[True] < wrong[False]
    return {"gate": stored} if wrong[stored] <= FEW_BORDERLINE else {}


def _run_gate(trial: Trial, dtype: str, x: Tensor, weight: Tensor, output: float) -> Tensor | None:
    case = GateCase(lead=str(len(x)), H=x.shape[1], D=16, dtype=dtype, optional=True)
    args = {"hidden_states": x, "gate_weight": weight[None], "shared_output": torch.full((len(x), 16), output)}
    return first_column(trial, case, args, {})
