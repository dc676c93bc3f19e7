"""Standard wrong outputs of the stage `sampler`, and the data that cannot tell them."""

import torch

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Excuse, Wrong
from moe_harness.harness.stages.sampler.cases import SamplerCase

NAMES = ("all_zeros", "likeliest", "least_likely", "any_token", "row_of_next", "behind_the_last")

ANY = ("all_zeros", "least_likely", "any_token", "row_of_next")  # what may come of a draw that nothing cuts


def _only_one(case: SamplerCase) -> bool:
    """Whether every token is right, or only counts could tell a wrong one."""
    return case.V == 1 or case.data in ("all_equal", "hot", "masked_hot")


EXCUSES = (
    Excuse("likeliest", lambda c: c.data != "draws", "the likeliest token may always be drawn"),
    *(Excuse(name, _only_one, "all tokens are alike") for name in ANY),
    *(
        Excuse(name, lambda c: c.data != "draws" and c.temperature != 0.0, "without a cut any token may be drawn")
        for name in ANY
    ),
    Excuse("row_of_next", lambda c: c.layout == "logits:expanded" or c.B == 1, "all rows are one"),
    Excuse("row_of_next", lambda c: c.data in ("ties", "edge_values", "peaked"), "rows share their likeliest tokens"),
    Excuse("any_token", lambda c: c.temperature == 0.0 and c.V < 8, "few tokens"),
)


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong tokens of the call."""
    logits = call.args["logits"].double()
    rows, width = logits.shape
    if not rows:
        return {}
    best = logits.argmax(1)
    random = torch.Generator().manual_seed(call.case.seed)
    return {
        "all_zeros": torch.zeros_like(best),
        "likeliest": best,
        "least_likely": logits.argmin(1),
        "any_token": torch.randint(0, width, (rows,), generator=random).to(best.device),
        "row_of_next": best.roll(1),
        "behind_the_last": torch.full_like(best, width),
    }
