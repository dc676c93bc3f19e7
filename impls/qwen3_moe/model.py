"""The contract's `model`: a folder on disk becomes an object that gives logits, single layers and generated tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.qwen3_moe.batch import Limits
from moe_harness.impls.qwen3_moe.config import Config
from moe_harness.impls.qwen3_moe.engine import Engine
from moe_harness.impls.qwen3_moe.expert_layouts import ExpertLayout, alone, expert_layout, splits_tokens
from moe_harness.impls.qwen3_moe.kernels import Kernels
from moe_harness.impls.qwen3_moe.loader import load
from moe_harness.impls.qwen3_moe.lockstep import LockstepEngine
from moe_harness.impls.qwen3_moe.network import Cache, Flat, Network, cache_shape
from moe_harness.impls.qwen3_moe.outputs import Output
from moe_harness.impls.qwen3_moe.pages import Pages
from moe_harness.impls.qwen3_moe.ranks import Ranks, SumNorm, share
from moe_harness.impls.qwen3_moe.runner import Runner
from moe_harness.impls.qwen3_moe.sequence import Request
from moe_harness.impls.qwen3_moe.weights import Layout

__all__ = ["model"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROGRESS = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """How the engine runs.

    Attributes:
        max_sequences: that run at once.
        max_tokens: of one step; prompts are cut into chunks beyond.
        max_length: positions of one sequence; None: as many as the model has, or as fit into the cache.
        page_size: tokens of a page.
        pages: None: what memory allows (`memory` of the free memory of a GPU, CPU_CACHE bytes elsewhere).
        prefixes: whether computed prefixes are kept for later requests.
        graphs: whether decoding steps run as CUDA graphs, on a GPU and with kernels that can be captured.
        kernels: "triton", "torch"; None: Triton's on a GPU.
        symmetric: whether GPUs of one host sum over ranks through symmetric memory, with what a decoding step joins to
            each sum in the same launch; otherwise by NCCL.  None: where every rank's GPU reaches those of all others.
    """

    max_sequences: int = 256
    max_tokens: int = 8192
    max_length: int | None = None
    page_size: int = 32
    pages: int | None = None
    memory: float = 0.9
    prefixes: bool = True
    graphs: bool = True
    kernels: str | None = None
    symmetric: bool | None = None


DISABLED = "disabled"
CPU_CACHE = 1 << 30
GRAPHS = 2 << 30  # left free for graphs and what cuBLAS keeps


class Model:
    """A loaded model on one device, or one rank of it.  Over ranks every call is made on all of them alike.

    Args:
        parameters: as `layout.empty` makes them, filled.
        ranks: those of the model; None where there is one.
        experts: how sparse layers run over them.

    Attributes:
        expert_parallel_backend: the dispatcher, or "disabled" where experts are not spread.
    """

    def __init__(
        self, layout: Layout, parameters: dict[str, Tensor], device: torch.device, dtype: torch.dtype,
        options: Options | None = None, ranks: Ranks | None = None, experts: ExpertLayout = alone,
    ):  # fmt: skip
        self.config, self.layout, self.device, self.dtype = layout.config, layout, device, dtype
        self.options = options or Options()
        chosen = self.options.kernels
        kernels = Kernels.for_device(device) if chosen is None else Kernels.of(chosen)
        self.ranks, self.expert_parallel_backend = ranks, DISABLED
        self.apart = layout.placement.data_parallel
        self.network = Network(layout, parameters, kernels, None if self.apart else ranks, experts)
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine, made when it is first needed: it takes the memory for the cache."""
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | Sequence[int], temperature: float = 0.0,
        seed: int = 0, stop_token_ids: Sequence[int] = (), ignore_eos: bool = False, progress: PROGRESS | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """New tokens of every prompt, a stop token among them.

        Args:
            max_new_tokens: one for all, or one per prompt.
            seed: the draw of a token depends on it, on the token's position and on its logits alone.
            progress: called with finished prompts and all of them.

        Raises:
            ValueError: counts that do not fit the prompts, token ids outside the vocabulary, a prompt that could never
                finish (Refused).
        """
        requests = self.requests(prompts, max_new_tokens, temperature, seed, stop_token_ids, ignore_eos)
        if self.ranks is None:
            return self.engine.generate(requests, progress)
        with self.ranks.naming_the_lost():
            self.ranks.same("the prompts and options of generate", requests)
            return self.engine.generate(requests, progress)

    def stream(self, prompt: Sequence[int], *, max_new_tokens: int, **options: Any) -> Iterator[int]:
        """The new tokens of one prompt as they come; arguments as for `generate`."""
        request = self.requests([prompt], max_new_tokens, **options)[0]
        return self.engine.stream(request) if self.ranks is None else self._streamed(request, self.ranks)

    def _streamed(self, request: Request, ranks: Ranks) -> Iterator[int]:
        with ranks.naming_the_lost():
            ranks.same("the prompt and options of stream", request)
            yield from self.engine.generate([request])[0] if self.apart else self.engine.stream(request)

    def requests(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], temperature: float = 0.0,
        seed: int = 0, stop_token_ids: Sequence[int] = (), ignore_eos: bool = False,
    ) -> list[Request]:  # fmt: skip
        """The engine's requests, checked; raises as `generate`."""
        counts = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if len(counts) != len(prompts):
            raise ValueError(
                f"max_new_tokens holds {len(counts)} numbers, wanted one for each of {len(prompts)} prompts"
            )
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}, wanted 0 or more")
        for place, prompt in enumerate(prompts):
            foreign = [token for token in prompt if not 0 <= token < self.config.vocab_size]
            if foreign:
                raise ValueError(f"prompt {place} holds {foreign[0]}, wanted ids in 0..{self.config.vocab_size - 1}")
        stop = frozenset(stop_token_ids) | (frozenset() if ignore_eos else self.config.stop_ids)
        return [
            Request(tuple(prompt), count, temperature, seed=seed, stop_ids=stop)
            for prompt, count in zip(prompts, counts, strict=True)
        ]

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, L, V] of input_ids [B, L], every position after those before it in its row."""
        if input_ids.numel() == 0:
            return torch.zeros(*input_ids.shape, self.config.vocab_size, dtype=self.dtype, device=self.device)
        return self._spread(self._logits, input_ids.to(self.device))

    def _logits(self, input_ids: Tensor) -> Tensor:
        flat, cache = self._alone(*input_ids.shape)
        logits = self.network.whole(self.network(input_ids.flatten(), flat, cache))
        return logits.unflatten(0, tuple(input_ids.shape))

    def _spread(self, run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`run` of rows [B, ...]; in data parallel of this rank's share of them, all shares brought together."""
        if not self.apart or self.ranks is None:
            return run(rows)
        counts = share(len(rows), self.ranks.size)
        return self.ranks.rows(run(rows.split(counts)[self.ranks.rank]).contiguous(), counts)

    @torch.inference_mode()
    def layer(self, i: int, hidden_states: Tensor) -> Tensor:
        """Layer i alone on the residual stream [B, L, H] of positions 0 to L - 1."""
        return self._spread(partial(self._layer, i), hidden_states)

    def _layer(self, i: int, hidden_states: Tensor) -> Tensor:
        flat, cache = self._alone(*hidden_states.shape[:2])
        rows = hidden_states.to(self.device, self.dtype).flatten(0, 1)
        output, stream = self.network.layer(i, rows, None, flat, cache.keys[i], cache.values[i])
        return (self.network.finished(output) + stream).view_as(hidden_states)

    @torch.inference_mode()
    def half(self, i: int, name: str, hidden_states: Tensor) -> Tensor:
        """One half of layer i on the residual stream [B, L, H]: "attention" or "mlp", residual included."""
        return self._spread(partial(self._half, i, name), hidden_states)

    def _half(self, i: int, name: str, hidden_states: Tensor) -> Tensor:
        flat, cache = self._alone(*hidden_states.shape[:2])
        rows, network, layer = (
            hidden_states.to(self.device, self.dtype).flatten(0, 1),
            self.network,
            f"model.layers.{i}",
        )
        if name == "attention":
            x = network.norm(f"{layer}.input_layernorm.weight", rows)[0]
            output: Output = network.mix(i, x, flat, cache.keys[i], cache.values[i])
        else:
            x = network.norm(f"{layer}.post_attention_layernorm.weight", rows)[0]
            mlp = network.sparse if i in self.config.sparse_layers else network.dense
            output = mlp(f"{layer}.mlp", x, flat)
        return (rows + network.finished(output)).view_as(hidden_states)

    def _alone(self, batch: int, length: int) -> tuple[Flat, Cache]:
        """A batch of `batch` whole sequences, and a cache for one layer at a time."""
        page = self.options.page_size
        columns = -(-length // page)
        cache = Cache(self.layout, batch * columns, page, self.dtype, self.device, shared=True, rows=batch)
        tables = self._whole(torch.arange(batch * columns)).view(batch, columns)
        positions = self._whole(torch.arange(length))
        slots = tables[:, positions.long() // page] * page + positions % page
        flat = Flat(
            positions.repeat(batch), slots.flatten(), self._whole(torch.arange(batch + 1) * length),
            self._whole(torch.full((batch,), length)), tables, 0, rows=torch.arange(batch, device=self.device),
        )  # fmt: skip
        return flat, cache

    def _whole(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.device, torch.int32)

    def _make_engine(self) -> Engine:
        o, c = self.options, self.config
        length = o.max_length or c.max_positions
        pages = o.pages or self._pages_that_fit(length)
        if self.ranks is not None:  # ranks plan alike, with as many pages as the one with the fewest has
            pages = self.ranks.smallest(pages)
        length = min(length, pages * o.page_size)
        columns = max(1, -(-(length - 1) // o.page_size))  # the last token is never an input
        limits = Limits(o.max_tokens, o.max_sequences, columns, o.page_size)
        graphs = o.graphs and self.capturable
        runner = Runner(self.network, self._cache(pages), limits, self.device, graphs)
        pool = Pages(pages, o.page_size, o.prefixes and len(c.attending) == c.layers)  # no state of a prefix is kept
        limits_of = {"max_sequences": o.max_sequences, "max_tokens": o.max_tokens, "max_length": length}
        if self.apart and self.ranks is not None:
            return LockstepEngine(self.ranks, runner.idle, runner, pool, **limits_of)
        return Engine(runner, pool, **limits_of)

    @property
    def capturable(self) -> bool:
        """Whether decoding steps can run as CUDA graphs: nothing in them waits for the host, here or over ranks."""
        over_ranks = self.ranks is None or (self.ranks.capturable and self.network.experts.capturable)
        return self.network.kernels.capturable and over_ranks

    def _cache(self, pages: int) -> Cache:
        o = self.options
        return Cache(self.layout, pages, o.page_size, self.dtype, self.device, rows=o.max_sequences)

    def _pages_that_fit(self, length: int) -> int:
        """As many pages as memory allows, and no more than all sequences can fill."""
        o, c = self.options, self.config
        element = torch.empty((), dtype=self.dtype).element_size()
        page_bytes = math.prod(cache_shape(self.layout)) * max(1, len(c.attending)) * o.page_size * element
        most = o.max_sequences * -(-length // o.page_size)
        if self.device.type != "cuda":
            return max(1, min(most, CPU_CACHE // page_bytes))
        limits = Limits(o.max_tokens, o.max_sequences, 1, o.page_size)
        Runner(self.network, self._cache(1), limits, self.device, graphs=False).warm_up()
        torch.cuda.synchronize(self.device)
        # What that step needed stays with torch's allocator and serves the steps to come.
        free = int(torch.cuda.mem_get_info(self.device)[0] * o.memory) - GRAPHS
        if free < page_bytes:
            raise MemoryError(
                f"{free / 2**30:.1f} GiB are left for the cache, wanted at least one page of {page_bytes:,} bytes; "
                f"use a smaller max_tokens ({o.max_tokens}) or a larger GPU"
            )
        return min(most, free // page_bytes)


def load_model(
    model_dir: str | Path, *, device: str | torch.device, dtype: str | torch.dtype, group: Any = None,
    expert_parallel: bool = False, dispatcher: str = "local_allreduce", progress: PROGRESS | None = None,
    **options: Any,
) -> Model:  # fmt: skip
    """The stage `model`: a decoder of one of the families in `config.ARCHITECTURES` from a Hugging Face folder.

    Args:
        dtype: what it computes in, whatever the checkpoint holds: fp32, fp16, bf16, or torch's own.
        group: a torch.distributed process group whose ranks share the model; each calls this and reads its own part.
        expert_parallel: ranks hold whole experts; otherwise columns of all of them.
        dispatcher: how tokens come to experts under expert parallelism: a name of impls.dispatchers.
        progress: called with bytes read and bytes in all, after every file.
        options: of `Options`, and of `Placement` (expert_shards, copies, data_parallel).

    Raises:
        CheckpointError (a ValueError): a folder that cannot be loaded; file, key, got and wanted are in the message.
        ValueError: unknown dtype or dispatcher; sizes that the ranks cannot share.  TypeError: unknown options.
    """
    folder = Path(model_dir)

    def fill(layout: Layout, parameters: dict[str, Tensor]) -> None:
        load(folder, layout, parameters, progress)

    given = {"device": device, "dtype": dtype, "group": group, "dispatcher": dispatcher}
    return assembled(Config.read(folder), fill, **given, expert_parallel=expert_parallel, **options)


def assembled(
    config: Config, fill: Callable[[Layout, dict[str, Tensor]], None], *, device: str | torch.device,
    dtype: str | torch.dtype, group: Any = None, expert_parallel: bool = False, dispatcher: str = "local_allreduce",
    **options: Any,
) -> Model:  # fmt: skip
    """As `load_model`, with the parameters of this rank that `fill` writes."""
    found = DTYPES.get(str(dtype), dtype)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    place = torch.device(device)
    placed = {key: options.pop(key) for key in PLACED if key in options}
    chosen = Options(**options)
    spread = group is not None and group.size() > 1
    if expert_parallel and config.num_experts:
        placed |= {"expert_parallel": True, "split_tokens": spread and splits_tokens(dispatcher, placed)}
    elif not config.num_experts:
        placed = {}  # a dense model has no experts to place
    layout = Layout(config, *((group.rank(), group.size()) if spread else (0, 1)), **placed)
    ranks = Ranks(group, place) if spread else None
    if ranks is not None and chosen.symmetric is not False:
        ranks.sum_norm = symmetric_sums(ranks, demanded=chosen.symmetric is True)
    experts = expert_layout(layout.placement, config.num_experts, dispatcher, ranks)
    parameters = layout.empty(found, place)
    fill(layout, parameters)
    model = Model(layout, parameters, place, found, chosen, ranks, experts)
    model.expert_parallel_backend = (
        dispatcher.removeprefix("dispatchers:") if layout.placement.expert_parallel else DISABLED
    )
    return model


def symmetric_sums(ranks: Ranks, demanded: bool) -> SumNorm | None:
    """What sums over ranks through symmetric memory; None where that is not demanded and they do not reach each other.

    Raises:
        NotImplementedError: on every rank, where it is demanded, and the group is not on GPUs or Triton is missing.
    """
    from moe_harness.impls.parallel import symmetric

    if symmetric.available(ranks.group) and (demanded or ranks.reach_each_other()):
        return symmetric.SumNorm(ranks.group, ranks.device)
    if demanded:
        raise NotImplementedError(
            "symmetric=True joins GPUs over nccl by kernels of Triton, wanted symmetric=False here"
        )
    return None


PLACED = ("expert_shards", "copies", "data_parallel")
model = load_model  # registered as qwen3_moe
