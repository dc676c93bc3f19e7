"""Checkpoints into parameters, strictly: every key is used, every element of every parameter is written exactly once.

All files are looked at before the first byte is copied, so that a wrong checkpoint is refused in a moment and its
message lists everything that is wrong.  Then of one tensor after the other this rank's slice is mapped, copied and let
go of: beside the parameters the host holds MAPPED of them, and of what other ranks hold nothing is read.
"""

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.qwen3_moe.config import CheckpointError
from moe_harness.impls.qwen3_moe.weights import Layout

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = ("BF16", "F16", "F32")
LISTED = 6  # complaints of one message
MAPPED = 1 / 32  # of this rank's bytes that may stay mapped before the file is opened anew, which lets go of them
REASONS = "was the download complete, and is config.json this checkpoint's own?"

Progress = Callable[[int, int], None]  # bytes read, bytes in all


def load(folder: Path, layout: Layout, parameters: dict[str, Tensor], progress: Progress | None = None) -> None:
    """Fill `parameters`, as `layout.empty` makes them, from the safetensors files in `folder`.

    Raises:
        CheckpointError: absent, truncated or foreign files; keys missing, left over or in two files; wrong shapes or
            dtypes; a NaN in the weights.
    """
    files = shards(folder)
    owners = _look(files, layout)
    total, done = sum(file.stat().st_size for file in files), 0
    written = dict.fromkeys(parameters, 0)
    limit = MAPPED * sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    for file in files:
        for key, stored in _stored(file, layout, limit):
            piece = layout.pieces[key]
            assert piece.parameter is not None
            kept, place = piece.read(stored), piece.place(parameters)
            assert place.shape == kept.shape, f"{key}: {kept.shape} goes into {place.shape}"
            place.copy_(kept)
            written[piece.parameter] += kept.numel()
            del kept, stored
        done += file.stat().st_size
        if progress is not None:
            progress(done, total)
    _all_written(folder, parameters, written)
    _copies_equal(owners, layout)


def _stored(file: Path, layout: Layout, limit: float) -> Iterator[tuple[str, Any]]:
    """Each key of `file` of which this rank keeps something, with the file's own slice of it.

    What was read stays mapped as long as the file is open, and so counts as memory of this process.
    """
    with _open(file) as shard:
        keys = [key for key in shard.keys() if key not in layout.copies]  # noqa: SIM118 - not a dict
    keys = [key for key in keys if not layout.config.foreign(key) and layout.pieces[key].parameter is not None]
    while keys:
        mapped = 0.0
        with _open(file) as shard:
            while keys and mapped <= limit:
                stored = shard.get_slice(keys[0])
                mapped += prod(layout.pieces[keys[0]].shape) * (4 if stored.get_dtype() == "F32" else 2)
                yield keys.pop(0), stored
                del stored


def shards(folder: Path) -> list[Path]:
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


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(
            f"{file}: got {size:,} bytes that are no whole safetensors file ({error}); {REASONS}"
        ) from error


def _look(files: list[Path], layout: Layout) -> dict[str, Path]:
    """The file of each key; everything that is wrong with names, shapes and dtypes in one CheckpointError."""
    owners: dict[str, Path] = {}
    wrong: list[str] = []
    for file in files:
        with _open(file) as shard:
            for key in shard.keys():  # noqa: SIM118
                if layout.config.foreign(key):
                    continue
                if key in owners:
                    wrong.append(f"{file}: {key} is in {owners[key].name} too, wanted once")
                    continue
                owners[key] = file
                known = layout.pieces.get(layout.copies.get(key, key))
                if known is None:
                    wrong.append(f"{file}: {key} is left over, wanted no such key in a {layout.config.model_type}")
                    continue
                found = shard.get_slice(key)
                shape, dtype, wanted = tuple(found.get_shape()), found.get_dtype(), known.shape
                if shape != wanted:
                    wrong.append(f"{file}: {key} has the shape {list(shape)}, wanted {list(wanted)}")
                if dtype not in DTYPES:
                    wrong.append(f"{file}: {key} has the dtype {dtype}, wanted one of {', '.join(DTYPES)}")
    missing = [key for key in layout.pieces if key not in owners]
    if missing:
        wrong.append(f"{files[0].parent}: {_some(missing)} missing, wanted in one of its {len(files)} files")
    index = files[0].parent / INDEX
    if index.is_file():
        moved = [key for key, name in _weight_map(index).items() if key in owners and owners[key].name != name]
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


def _copies_equal(owners: dict[str, Path], layout: Layout) -> None:
    """A tensor that the config calls a copy of another one is one."""
    for key, original in layout.copies.items():
        if key not in owners:
            continue
        with _open(owners[key]) as copy, _open(owners[original]) as source:
            own = layout.pieces[original]  # each rank looks at its own part
            if not torch.equal(own.read(copy.get_slice(key)), own.read(source.get_slice(original))):
                raise CheckpointError(
                    f"{owners[key]}: {key} differs from {original}, wanted equal ones: tie_word_embeddings is true"
                )
