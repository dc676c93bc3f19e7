"""Faults of the sum over ranks in symmetric memory, as changes of the kernel's text, and by what they are seen."""

from dataclasses import dataclass

PUTS = "    real = column < width\n"
FLAGS = "    _raise_flags(peers, half, epoch, rows, RANK, RANKS, PROGRAMS)\n"
LOADED = 'tl.load(at, mask=real, other=0.0, cache_modifier=".cg").to(tl.float32)'


@dataclass(frozen=True)
class Planted:
    """What stands where in the text, and the words of the complaint."""

    changes: tuple[tuple[str, str], ...]
    seen: str = "total"


FAULTS = {
    # Of the protocol: they show only where one rank is late, or far ahead.
    "flag_without_the_number_of_the_call": Planted((("while (seen >> 32) < epoch:", "while (seen >> 32) == 0:"),)),
    "flag_of_the_last_call_on_this_half": Planted((("(seen >> 32) < epoch:", "(seen >> 32) < epoch - 2:"),)),
    "number_of_the_call_not_kept": Planted((("    tl.store(epochs + program, epoch)\n", ""),)),
    "flags_raised_before_the_rows_are_there": Planted(((FLAGS, ""), (PUTS, PUTS + FLAGS))),
    "one_half_for_all_calls": Planted((("base = first + half * half_size", "base = first"),)),
    "own_flag_alone_waited_for": Planted(
        (("seen = _wait_for(peers, half, epoch, q,", "seen = _wait_for(peers, half, epoch, q * 0 + RANK,"),)
    ),
    # Of the sum: where its order and its precision are other ones, ranks may hold other bits and choose other experts.
    "own_part_first": Planted((("at = own + (q * bound + row)", "at = own + ((q + RANK) % RANKS * bound + row)"),)),
    "last_rank_first": Planted((("at = own + (q * bound + row)", "at = own + ((RANKS - 1 - q) * bound + row)"),)),
    "sum_in_the_dtype_of_the_parts": Planted(
        ((f"s += {LOADED}", f"s = narrow(s + {LOADED}, part.dtype.element_ty, WIDEN).to(tl.float32)"),)
    ),
    "residual_on_every_rank": Planted((("s += tl.load(residual", "s += RANKS * tl.load(residual"),)),
    "residual_on_the_first_rank": Planted((("        if ADD:", "        if ADD and RANK == 0:"),)),
    "parts_of_other_rows_taken": Planted(
        (('agreed = tl.where(seen == rows, agreed, float("nan"))', "agreed = 0.0"),), "NaN"
    ),
    # Of the norm.
    "eps_left_out": Planted((("/ width + eps)", "/ width)"),), "out"),
    "eps_beside_the_root": Planted((("/ width + eps)", "/ width) + eps"),), "out"),
    "mean_over_the_block": Planted((("/ width + eps)", "/ BLOCK + eps)"),), "out"),
}
