"""What an answer depends on besides the request: the implementation's source and switches, the model's files, versions,
the device.

Too much rather than too little: a change that would not have changed an answer costs a run, one that is overlooked
serves a candidate the answers of its predecessor.
"""

import hashlib
import importlib.metadata
import inspect
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SOURCES = (".py", ".pyi", ".cu", ".cuh", ".cpp", ".cc", ".h", ".hpp", ".so", ".json", ".toml")
PACKAGES = ("torch", "transformers", "triton", "tokenizers", "lm_eval", "liger-kernel", "vllm")
SWITCHES = ("TRITON_", "TORCH", "PYTORCH_", "NVIDIA_", "CUBLAS", "VLLM_", "SGLANG_", "FLASHINFER_", "DG_")
NO_SWITCH = ("DIR", "HOME", "PATH", "CACHE", "LOG", "VISIBLE")  # words of variables that say where, or how loud
WHOLE_BELOW = 1 << 30  # bytes of weights that are read to the end; above, sizes and times have to do
JUDGE = tuple(f"moe_harness.{room}" for room in ("harness", "fixtures", "reference", "suites"))


def source_hash(function: Callable[..., Any] | type) -> str:
    """A hash over the file that holds `function`, what lies beside it, and every loaded module that is not installed.

    Of a package everything counts, since some of it may be imported only when it is first called; and so does the value
    of every environment variable that one of these files names in quotes, which is how they are read.
    An installed package is named by its version instead: its files are not edited.
    """
    try:
        file = Path(inspect.getfile(inspect.unwrap(function))).resolve()  # type: ignore[arg-type]
    except TypeError:  # a builtin or an object that can be called
        return f"{type(function).__module__}.{type(function).__qualname__}"
    if (package := _installed(file)) is not None:
        return f"{package} {version(package)}"
    beside = [path for path in _beside(file) if path.suffix in SOURCES and path.is_file()]
    files = sorted({file, *beside, *_loaded()})
    if read := _read_by(files):
        return hashlib.sha256(f"{files_hash(files)} {read}".encode()).hexdigest()[:32]
    return files_hash(files)


def _read_by(files: Iterable[Path]) -> list[tuple[str, str]]:
    """Environment variables, with their values, that any of these files names in quotes."""
    text = b"\n".join(path.read_bytes() for path in files)
    quoted = ((name, value, name.encode()) for name, value in sorted(os.environ.items()))
    return [(name, value) for name, value, n in quoted if b'"%b"' % n in text or b"'%b'" % n in text]


def _installed(file: Path) -> str | None:
    """The package that an installed file belongs to."""
    for at, part in enumerate(file.parts[:-1]):
        if part in ("site-packages", "dist-packages"):
            return file.parts[at + 1].removesuffix(".py")
    return None


def _beside(file: Path) -> Iterable[Path]:
    """The whole package of a file; of a loose one its folder alone, which may be a home directory."""
    folder = file.parent
    if not (folder / "__init__.py").exists():
        return folder.iterdir()
    while (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return folder.rglob("*")


def _loaded() -> Iterable[Path]:
    """Files of loaded modules that are neither installed nor Python's nor those of the judge."""
    standard = Path(sysconfig.get_path("stdlib"))
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if not path or name.startswith(JUDGE):
            continue
        file = Path(path).resolve()
        if file.suffix in SOURCES and file.is_file() and _installed(file) is None and standard not in file.parents:
            yield file


def files_hash(paths: list[Path]) -> str:
    """A hash over names and contents."""
    hashed = hashlib.sha256()
    for path in paths:
        hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:32]


def model_hash(folder: Path) -> str:
    """A hash over a checkpoint's folder; of weights of WHOLE_BELOW bytes and more, sizes and times of change."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    weights = [path for path in files if path.suffix in (".safetensors", ".bin", ".pt")]
    if sum(path.stat().st_size for path in weights) < WHOLE_BELOW:
        return files_hash(files)
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    rest = files_hash([path for path in files if path not in weights])
    return hashlib.sha256(f"{about} {rest}".encode()).hexdigest()[:32]


def version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def surroundings(device: str) -> dict[str, Any]:
    """Versions, the device's name, and the variables by which installed libraries are switched."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": name, "versions": {package: found for package in PACKAGES if (found := version(package))},
        "switches": {
            name: value for name, value in sorted(os.environ.items())
            if name.startswith(SWITCHES) and not any(word in name for word in NO_SWITCH)
        },
    }  # fmt: skip
