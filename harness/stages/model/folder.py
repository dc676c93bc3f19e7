"""A checkpoint on disk as the reference takes it: config, and tensors by their released names, read when used."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.reference.model import Model


class Tensors(Mapping[str, Tensor]):
    """The tensors of every safetensors file in a folder; none is kept in memory."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.files: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                opened = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{file}: got no whole safetensors file ({error})") from error
            self.files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def reference_of(folder: Path) -> Model:
    """The reference over a folder.

    Raises:
        UsageError: no folder, config.json or tensors; a model that the reference does not know.
        CannotJudge: safetensors is not installed.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json, wanted a Hugging Face model folder")
    try:
        keys, tensors = json.loads((folder / "config.json").read_text()), Tensors(folder)
        model = Model(keys, tensors)
        missing = [name for name in ("model.embed_tokens.weight", "model.norm.weight") if name not in model.weights]
    except ImportError as error:
        raise CannotJudge("reading a checkpoint needs safetensors: pip install safetensors") from error
    except (ValueError, KeyError) as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from error
    if missing:
        raise UsageError(f"{folder}: its *.safetensors lack {', '.join(missing)}")
    return model
