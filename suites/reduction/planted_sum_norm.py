"""Faults of the sum over ranks in symmetric memory, as changes of the kernel's text, and by what they are seen."""

from dataclasses import dataclass

BASE = "    base = first + half * half_size\n"
FLAGS = "    _raise_flags(peers, half, epoch, rows, RANK, RANKS, PROGRAMS)\n"
TOLD = "    _raise_flags(peers, half, epoch, rows, RANK, RANKS, PROGRAMS, False)\n"
LOOKED = "while (tl.min((words >> 32).to(tl.int64), 0) < epoch) & (agreed == 0.0):"
LOADED = 'tl.load(at, mask=real, other=0.0, cache_modifier=".cg").to(tl.float32)'
TAKEN = "_of_words(words, shift, kind, BITS)"
WORDS, ROWS = "sum_norm_in_words", "sum_norm"  # the kernels
Change = tuple[str, str]


@dataclass(frozen=True)
class Planted:
    """What stands where in the text of a kernel and what it calls, and the words of the complaint.

    `early`: ranks are slow between what they announce and what they put.
    """

    kernel: str
    changes: tuple[Change, ...]
    seen: str = "total"
    early: bool = False
    dtype: str = "fp32"


TOLD_FIRST: tuple[Change, ...] = (
    (TOLD, ""),
    (BASE, BASE + TOLD),
)  # as right: words tell that they are there
OF_BOTH: dict[str, tuple[tuple[Change, ...], str]] = {
    # Of the protocol: they show only where one rank is late, or far ahead.
    "number_of_the_call_not_kept": ((("    tl.store(epochs + program, epoch)\n", ""),), "total"),
    "one_half_for_all_calls": (((BASE, "    base = first\n"),), "total"),
    # Of the sum: where its order and its precision are other ones, ranks may hold other bits and choose other experts.
    "own_part_first": ((("at = own + (q * bound + row)", "at = own + ((q + RANK) % RANKS * bound + row)"),), "total"),
    "last_rank_first": ((("at = own + (q * bound + row)", "at = own + ((RANKS - 1 - q) * bound + row)"),), "total"),
    "residual_on_every_rank": ((("s += added", "s += RANKS * added"),), "total"),
    "residual_of_the_first_row_for_all": ((("more = row + PROGRAMS", "more = program"),), "total"),
    "residual_on_the_first_rank": ((("s += added", "s += added if RANK == 0 else 0.0 * added"),), "total"),
    # Of the norm.
    "eps_left_out": ((("/ width + eps)", "/ width)"),), "out"),
    "eps_beside_the_root": ((("/ width + eps)", "/ width) + eps"),), "out"),
    "mean_over_the_block": ((("/ width + eps)", "/ BLOCK + eps)"),), "out"),
}
OF_ROWS: dict[str, tuple[Change, ...]] = {
    "flag_without_the_number_of_the_call": (("while (seen >> 32) < epoch:", "while (seen >> 32) == 0:"),),
    "flag_of_the_last_call_on_this_half": (("(seen >> 32) < epoch:", "(seen >> 32) < epoch - 2:"),),
    "flags_raised_before_the_rows_are_there": ((FLAGS, ""), (BASE, BASE + FLAGS)),
    "own_flag_alone_waited_for": (
        ("seen = _wait_for(peers, half, epoch, q,", "seen = _wait_for(peers, half, epoch, q * 0 + RANK,"),
    ),
}
OF_WORDS: dict[str, tuple[Change, ...]] = {
    "rows_of_the_last_call_on_this_half": (("(seen >> 32) < epoch:", "(seen >> 32) < epoch - 2:"),),
    "rows_of_any_call": (("while (seen >> 32) < epoch:", "while (seen >> 32) == 0:"),),
}
EARLY: dict[str, tuple[Change, ...]] = {
    "words_not_looked_at": ((LOOKED, "while (epoch < 0) & (agreed == 0.0):"),),
    "words_of_any_call_taken": ((LOOKED, LOOKED.replace("< epoch)", "== 0)")),),
    "words_of_the_last_call_on_this_half_taken": ((LOOKED, LOOKED.replace("< epoch)", "< epoch - 2)")),),
}

RIGHT = "told_first"
FAULTS = {
    **{f"{kernel}:{name}": Planted(kernel, *given) for name, given in OF_BOTH.items() for kernel in (ROWS, WORDS)},
    **{f"{ROWS}:{name}": Planted(ROWS, changes) for name, changes in OF_ROWS.items()},
    **{f"{WORDS}:{name}": Planted(WORDS, changes) for name, changes in OF_WORDS.items()},
    f"{ROWS}:parts_of_other_rows_taken": Planted(  # of words, some never come
        ROWS, (('agreed = tl.where(seen == rows, agreed, float("nan"))', "agreed = 0.0"),), "NaN"
    ),
    f"{ROWS}:sum_in_the_dtype_of_the_parts": Planted(
        ROWS, ((f"s += {LOADED}", f"s = narrow(s + {LOADED}, kind, WIDEN).to(tl.float32)"),), dtype="bf16"
    ),
    f"{WORDS}:sum_in_the_dtype_of_the_parts": Planted(
        WORDS, ((f"s += {TAKEN}", f"s = narrow(s + {TAKEN}, kind, WIDEN).to(tl.float32)"),), dtype="bf16"
    ),
    f"{WORDS}:columns_of_a_word_swapped": Planted(
        WORDS, (("(words[:, None] >> shift)", "(words[:, None] >> (32 - BITS - shift))"),), dtype="bf16"
    ),
    **{f"{WORDS}:{name}": Planted(WORDS, (*TOLD_FIRST, *given), early=True) for name, given in EARLY.items()},
    RIGHT: Planted(WORDS, TOLD_FIRST, seen="", early=True),  # no fault: what the ones before change too
}
