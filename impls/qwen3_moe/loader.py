"""Checkpoints into parameters, strictly: every key is used, every element of every parameter is written exactly once.

All files are looked at before the first tensor is read, so that a wrong checkpoint is refused in a moment and its
message lists everything that is wrong.  Then the rows that this rank keeps something of are read in runs
(`shards.read`), and of them its columns are copied: beside the parameters the host holds a few buffers.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_harness.impls.qwen3_moe import shards
from moe_harness.impls.qwen3_moe.config import CheckpointError
from moe_harness.impls.qwen3_moe.pieces import Piece
from moe_harness.impls.qwen3_moe.shards import DTYPES, REASONS, Stored
from moe_harness.impls.qwen3_moe.weights import Layout

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LISTED = 6  # complaints of one message

Progress = Callable[[int, int], None]  # bytes read, bytes in all


def load(folder: Path, layout: Layout, parameters: dict[str, Tensor], progress: Progress | None = None) -> None:
    """Fill `parameters`, as `layout.empty` makes them, from the safetensors files in `folder`.

    Raises:
        CheckpointError: absent, truncated or foreign files; keys missing, left over or in two files; wrong shapes or
            dtypes; a NaN in the weights.
    """
    files = files_of(folder)
    held = {file: shards.opened(file) for file in files}
    owners = _look(held, layout)
    total, done = sum(file.stat().st_size for file in files), 0
    written = dict.fromkeys(parameters, 0)
    pinned = any(parameter.is_cuda for parameter in parameters.values())
    for file in files:
        kept = [tensor for key, tensor in held[file].items() if _is_kept(key, layout)]
        pieces = {tensor.key: layout.pieces[tensor.key] for tensor in kept}
        wanted = (run for tensor in kept for run in shards.runs(tensor, pieces[tensor.key].rows))
        for run, rows in shards.read(wanted, pinned):
            piece = pieces[run.stored.key]
            assert piece.parameter is not None
            written[piece.parameter] += _copy(piece, run, rows, parameters)
        done += file.stat().st_size
        if progress is not None:
            progress(done, total)
    _all_written(folder, parameters, written)
    _copies_equal(owners, layout)


def _is_kept(key: str, layout: Layout) -> bool:
    """Whether this rank keeps something of the tensor."""
    if key in layout.copies or layout.config.foreign(key):
        return False
    return layout.pieces[key].parameter is not None


def _copy(piece: Piece, run: shards.Run, rows: Tensor, parameters: dict[str, Tensor]) -> int:
    """Put these rows where they belong; how many elements that are.

    A GPU gets whole rows and takes its columns of them itself: a copy of columns by the host is slower than the link.
    """
    place, first = piece.place(parameters), run.start - piece.rows.start
    assert len(place) == len(piece.rows), f"{run.stored.key}: {len(piece.rows)} rows go into {len(place)}"
    kept = piece.of_rows(rows.to(place.device))
    place[first : first + len(rows)].copy_(kept)
    return kept.numel()


def files_of(folder: Path) -> list[Path]:
    """The checkpoint's files in order, as its index names them, or its single file."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        found = sorted(path.name for path in folder.glob("*"))[:5]
        raise CheckpointError(f"{folder}: got {', '.join(found) or 'nothing'}, wanted {SINGLE} or {INDEX}")
    names = sorted(set(_weight_map(index).values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: it names {_some(absent)}, wanted in {folder}: the file is not there; {REASONS}"
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        if found and all(isinstance(name, str) for name in found.values()):
            return found
        raise ValueError("an empty or ill-formed weight_map")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: got {error!r}, wanted an object with the key weight_map") from error


def _look(held: dict[Path, dict[str, Stored]], layout: Layout) -> dict[str, Stored]:
    """What the files hold by its key; everything that is wrong with names, shapes, dtypes in one CheckpointError."""
    owners: dict[str, Stored] = {}
    wrong: list[str] = []
    for file, tensors in held.items():
        for key, found in tensors.items():
            if layout.config.foreign(key):
                continue
            if key in owners:
                wrong.append(f"{file}: {key} is in {owners[key].file.name} too, wanted once")
                continue
            owners[key] = found
            known = layout.pieces.get(layout.copies.get(key, key))
            if known is None:
                wrong.append(f"{file}: {key} is left over, wanted no such key in a {layout.config.model_type}")
                continue
            if found.shape != known.shape:
                wrong.append(f"{file}: {key} has the shape {list(found.shape)}, wanted {list(known.shape)}")
            if found.dtype not in DTYPES:
                wrong.append(f"{file}: {key} has the dtype {found.dtype}, wanted one of {', '.join(DTYPES)}")
    folder = next(iter(held)).parent
    missing = [key for key in layout.pieces if key not in owners]
    if missing:
        wrong.append(f"{folder}: {_some(missing)} missing, wanted in one of its {len(held)} files")
    index = folder / INDEX
    if index.is_file():
        moved = [key for key, name in _weight_map(index).items() if key in owners and owners[key].file.name != name]
        if moved:
            wrong.append(f"{index}: {_some(moved)} not in the file that the index names")
    if wrong:
        more = f"\n... and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise CheckpointError("\n".join(wrong[:LISTED]) + more + f"\n{REASONS}")
    return owners


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _all_written(folder: Path, parameters: dict[str, Tensor], written: dict[str, int]) -> None:
    for name, parameter in parameters.items():
        if written[name] != parameter.numel():
            raise CheckpointError(f"{folder}: {name} got {written[name]} elements, wanted {parameter.numel()}")
        if _holds_nan(parameter):
            raise CheckpointError(f"{folder}: {name} holds NaN after loading, wanted numbers")


def _holds_nan(parameter: Tensor) -> bool:
    """The largest element is NaN where any is; on a CPU this takes a tenth of the time of looking at each."""
    return parameter.numel() > 0 and bool(parameter.max().isnan())


def _copies_equal(owners: dict[str, Stored], layout: Layout) -> None:
    """A tensor that the config calls a copy of another one is one."""
    for key, original in layout.copies.items():
        if key not in owners:
            continue
        rows = layout.pieces[original].rows  # each rank looks at its own part
        pairs = zip(*(shards.read(shards.runs(owners[name], rows)) for name in (key, original)), strict=True)
        if not all(torch.equal(copy, source) for (_, copy), (_, source) in pairs):
            raise CheckpointError(
                f"{owners[key].file}: {key} differs from {original}, wanted equal ones: tie_word_embeddings is true"
            )
