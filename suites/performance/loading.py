"""How fast a checkpoint of Qwen3-30B-A3B's shape is read, by one GPU and over ranks, and what the host holds meanwhile.

    python3 suites/performance/loading.py --folder DIR [--ranks 2] [--layers 48] [--json FILE]

Random weights are written to DIR first, in the released layout (`--layers` where it has no room for 61 GB), and taken
away at the end.  Caches are dropped before every measurement where this process may; the speed of reading one file
from end to end is told beside.  Per rank: its share in bytes, seconds from the call of `load_model` to the last byte on
the GPU, bytes of its share a second, and the peaks of the host's memory, over what the process held before, and of the
GPU's, as multiples of the share; the latter holds a small cache besides.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_harness.fixtures.checkpoints import shapes
from moe_harness.suites.performance.whole_model import CONFIG

FILE_BYTES = 4 << 30  # of one file, as released
POOL = 1 << 26  # numbers that are drawn; longer tensors repeat them
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {}, "tp": {}, "ep": {"expert_parallel": True, "dispatcher": "local_allreduce"},
}  # fmt: skip


def write(folder: Path, layers: int) -> int:
    """A checkpoint with its index; its bytes."""
    from safetensors.torch import save_file

    keys = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(keys))
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    files, total, index = list(_files(keys)), 0, {}
    for number, names in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file({key: _tensor(pool, shape) for key, shape in names}, folder / name, metadata={"format": "pt"})
        total += (folder / name).stat().st_size
        index |= {key: name for key, _ in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def _files(keys: dict[str, Any]) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    names: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for key, shape in shapes(keys):
        names.append((key, shape))
        size += 2 * torch.Size(shape).numel()
        if size > FILE_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _tensor(pool: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return (pool if count <= POOL else pool.repeat(-(-count // POOL)))[:count].view(shape).clone()


def drop_caches() -> bool:
    """Make the files be read from where they lie; False where this process may not."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def reading_speed(folder: Path) -> float:
    """Bytes a second of one file, from end to end."""
    file, size = sorted(folder.glob("*.safetensors"))[0], 0
    began = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(1 << 24):
            size += len(block)
    return size / (time.perf_counter() - began)


def held(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measured(folder: Path, group: Any, layout: dict[str, Any]) -> dict[str, Any]:
    from moe_harness.impls.qwen3_moe.model import load_model

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    torch.cuda.reset_peak_memory_stats()
    before, began = held("VmRSS"), time.perf_counter()
    device = f"cuda:{torch.cuda.current_device()}"
    model = load_model(folder, device=device, dtype="bf16", group=group, pages=64, **layout)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    share = sum(parameter.numel() * parameter.element_size() for parameter in model.network.p.values())
    peak = held("VmHWM") - before
    return {"share_bytes": share, "seconds": round(seconds, 2), "GB_per_s": round(share / seconds / 1e9, 2),
            "peak_host_bytes": peak, "peak_over_share": round(peak / share, 3),
            "device_peak_over_share": round(torch.cuda.max_memory_allocated() / share, 3)}  # fmt: skip


def run_rank(rank: int, ranks: int, store: str, folder: str, told: str) -> None:
    """All layouts one after the other; rank 0 writes what every rank found after each."""
    torch.cuda.set_device(rank)
    place = dist.FileStore(store, ranks)
    dist.init_process_group("nccl", store=place, rank=rank, world_size=ranks, timeout=timedelta(minutes=10),
                            device_id=torch.device("cuda", rank))  # fmt: skip
    torch.zeros(1 << 20, device="cuda").cpu()  # what is allocated and imported once, is now
    import moe_harness.impls.qwen3_moe.model  # noqa: F401

    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        cold = drop_caches() if rank == 0 else True
        dist.barrier()
        torch.cuda.synchronize()
        alone = name == "one"
        own = measured(Path(folder), None if alone else dist.group.WORLD, layout) if not alone or rank == 0 else None
        torch.cuda.empty_cache()
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, own)
        if rank == 0:
            found[name] = {"cold": cold, "ranks": [entry for entry in every if entry]}
            print(name, json.dumps(found[name]), flush=True)
            Path(told).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--json", type=Path, default=Path("loading.json"))
    given = parser.parse_args()
    if torch.cuda.device_count() < given.ranks:
        parser.error(f"--ranks is {given.ranks}, but there are {torch.cuda.device_count()} GPUs")
    found: dict[str, Any] = {
        "command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), "ranks": given.ranks,
        "versions": {"torch": torch.__version__}, "model": "qwen3-30b-a3b", "layers": given.layers,
    }  # fmt: skip
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as name, tempfile.TemporaryDirectory() as scratch:
        folder, told, began = Path(name), Path(scratch, "told.json"), time.perf_counter()
        found["checkpoint_bytes"] = write(folder, given.layers)
        print(f"{found['checkpoint_bytes'] / 1e9:.1f} GB written in {time.perf_counter() - began:.1f} s", flush=True)
        found["dropped"] = drop_caches()
        found["file_GB_per_s"] = round(reading_speed(folder) / 1e9, 2)
        print(f"one file is read at {found['file_GB_per_s']} GB/s", flush=True)
        mp.spawn(run_rank, (given.ranks, f"{scratch}/store", name, str(told)), nprocs=given.ranks)
        found["layouts"] = json.loads(told.read_text())
    given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
