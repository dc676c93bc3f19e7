"""Models over ranks by somebody who has read the contract alone: plain torch, nothing of ours; one is right.

`right` cuts heads and columns by rank, and with expert_parallel gives whole experts to ranks; it keeps no cache.  The
others are it with one mistake each, under the words by which the judge has to name it (SAID).
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

FAMILIES = ("qwen3_moe", "qwen2_moe", "qwen3")


class Model:
    """A decoder of which this rank holds its part."""

    def __init__(self, folder: str, device: str, dtype: torch.dtype, group: Any, expert_parallel: bool):
        self.config = json.loads(Path(folder, "config.json").read_text())
        if self.config["model_type"] not in FAMILIES:
            raise ValueError(f"{self.config['model_type']} is none of {', '.join(FAMILIES)}")
        self.held: dict[str, Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            self.held |= {name: t.to(device, dtype) for name, t in load_file(file).items()}
        self.group, self.ep = group, expert_parallel
        self.rank, self.ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.eps = self.config["rms_norm_eps"]

    def own(self, name: str, dim: int) -> Tensor:
        """This rank's rows or columns of a tensor."""
        return self.held[name].tensor_split(self.ranks, dim)[self.shard(name)]

    def shard(self, name: str) -> int:
        return self.rank

    def summed(self, partial: Tensor, where: str) -> Tensor:
        if self.group is not None:
            partial = partial.clone()
            dist.all_reduce(partial, group=self.group)
        return partial

    def norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.held[name]

    def rotated(self, x: Tensor) -> Tensor:
        """[B, heads, L, D], halves."""
        half, length = x.shape[-1] // 2, x.shape[-2]
        frequencies = self.config["rope_theta"] ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        one, two = x.float().chunk(2, -1)
        turned = (one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin())
        return torch.cat(turned, -1).to(x.dtype)

    def attention(self, layer: str, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        dim = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        heads = []
        for part in "qkv":
            name = f"{layer}.{part}_proj"
            bias = self.own(f"{name}.bias", 0) if f"{name}.bias" in self.held else None
            head = F.linear(x, self.own(f"{name}.weight", 0), bias).view(batch, length, -1, dim)
            if f"{layer}.{part}_norm.weight" in self.held:
                head = self.norm(head, f"{layer}.{part}_norm.weight")
            heads.append(head.transpose(1, 2))
        q, k, v = self.rotated(heads[0]), self.rotated(heads[1]), heads[2]
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.summed(F.linear(out, self.own(f"{layer}.o_proj.weight", 1)), "attention")

    def gated(self, name: str, x: Tensor, whole: bool = False) -> Tensor:
        """The whole of an mlp, or the part that this rank's columns make."""
        gate, up, down = (
            self.held[f"{name}.{part}_proj.weight"] if whole else self.own(f"{name}.{part}_proj.weight", dim)
            for part, dim in (("gate", 0), ("up", 0), ("down", 1))
        )
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def experts_here(self) -> list[int]:
        experts = list(range(self.config["num_experts"]))
        return torch.tensor(experts).tensor_split(self.ranks)[self.rank].tolist() if self.ep else experts

    def experts(self, name: str, x: Tensor) -> Tensor:
        scores = self.preferred(F.linear(x, self.held[f"{name}.gate.weight"]).float()).softmax(-1)
        weights, ids = scores.topk(self.config["num_experts_per_tok"], -1)
        if self.config["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in self.experts_here():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            if len(rows):
                y = self.gated(f"{name}.experts.{self.held_as(expert)}", x[rows], whole=self.ep)
                out.index_add_(0, rows, y.float() * weights[rows, slots, None])
        if f"{name}.shared_expert_gate.weight" in self.held:
            gate = torch.sigmoid(F.linear(x, self.held[f"{name}.shared_expert_gate.weight"]))
            out = out + (gate * self.shared(f"{name}.shared_expert", x)).float()
        return self.summed(out.to(x.dtype), "experts")

    def preferred(self, logits: Tensor) -> Tensor:
        return logits

    def held_as(self, expert: int) -> int:
        return expert

    def shared(self, name: str, x: Tensor) -> Tensor:
        return self.gated(name, x)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Any:
        x = self.held["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + self.attention(f"{layer}.self_attn", self.norm(x, f"{layer}.input_layernorm.weight"))
            rows = self.norm(x, f"{layer}.post_attention_layernorm.weight").flatten(0, 1)
            sparse = f"{layer}.mlp.gate.weight" in self.held
            out = self.experts(f"{layer}.mlp", rows) if sparse else self.summed(self.gated(f"{layer}.mlp", rows), "mlp")
            x = x + out.view_as(x)
        return self.head(self.norm(x, "model.norm.weight"))

    def head(self, x: Tensor) -> Any:
        logits = F.linear(x, self.own("lm_head.weight", 0))
        return self.gathered(logits) if self.group is not None else logits

    def gathered(self, shard: Tensor) -> Tensor:
        shards = [torch.empty_like(shard) for _ in range(self.ranks)]
        dist.all_gather(shards, shard.contiguous(), group=self.group)
        return torch.cat(shards, -1)

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
        stop_token_ids: tuple = (), ignore_eos: bool = False,
    ) -> list[list[int]]:  # fmt: skip
        return [self.continued(prompt, max_new_tokens, temperature, seed) for prompt in prompts]

    def continued(self, prompt: list[int], new: int, temperature: float, seed: int) -> list[int]:
        row, noise = list(prompt), torch.Generator().manual_seed(seed)
        for _ in range(new):
            row.append(self.next(self(torch.tensor([row]))[0, -1], temperature, noise))
        return row[len(prompt) :]

    def next(self, logits: Tensor, temperature: float, noise: torch.Generator) -> int:
        if not temperature:
            return int(logits.argmax())
        return int(torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=noise))


def loader(kind: type[Model]) -> Any:
    def load_model(
        model_dir: str, *, device: str, dtype: torch.dtype, group: Any = None, expert_parallel: bool = False
    ) -> Model:
        return kind(model_dir, device, dtype, group, expert_parallel)

    return load_model


right = loader(Model)

# ------------------------------------------------------------------------------------------------- one mistake each

SAID: dict[str, tuple[str, str]] = {}  # name -> the case that shows it, words that have to be told


def mistake(case: str, words: str) -> Any:
    def enter(kind: type[Model]) -> Any:
        SAID[kind.__name__] = (f"model/over_ranks/{case}", words)
        return loader(kind)

    return enter


CUT, WHOLE = "variant=logits,B=3,L=5,R=2,seed=1", "variant=logits,B=3,L=5,R=2,ep=1,seed=1"
SHARED = "variant=logits,family=qwen2_moe,B=3,L=5,R=2,seed=6"
TOKENS, DRAWN = "variant=tokens,B=3,L=5,new=5,R=2,seed=4", "variant=drawn,dtype=bf16,B=3,L=5,new=5,R=2,seed=5"


@mistake(CUT, "every rank holds the first rank's shard")
class first_shard_everywhere(Model):
    def shard(self, name: str) -> int:
        return 0


@mistake(CUT, "every rank holds the first rank's rows")
class first_rows_everywhere(Model):
    def shard(self, name: str) -> int:
        cut_by_columns = ("o_proj.weight", "down_proj.weight", "lm_head.weight")
        return self.rank if name.endswith(cut_by_columns) else 0


@mistake(WHOLE, "every rank holds the first rank's experts")
class first_experts_everywhere(Model):
    def held_as(self, expert: int) -> int:
        return expert % (self.config["num_experts"] // self.ranks)


@mistake(CUT, "the sum over ranks after attention is left out")
class attention_reduced_by_nobody(Model):
    def summed(self, partial: Tensor, where: str) -> Tensor:
        return partial if where == "attention" else super().summed(partial, where)


@mistake(WHOLE, "the sum over ranks after the experts is left out")
class experts_reduced_by_nobody(Model):
    def summed(self, partial: Tensor, where: str) -> Tensor:
        return partial if where == "experts" else super().summed(partial, where)


@mistake(WHOLE, "the experts are summed over ranks twice")
class experts_reduced_twice(Model):
    def summed(self, partial: Tensor, where: str) -> Tensor:
        once = super().summed(partial, where)
        return super().summed(once, where) if where == "experts" else once


@mistake(WHOLE.replace("seed=1", "twins=1,seed=3"), "routers choose apart: of equal experts each rank takes its own")
class own_experts_first(Model):
    def preferred(self, logits: Tensor) -> Tensor:
        logits[:, self.experts_here()] *= 1 + 2**-22
        return logits


@mistake(SHARED, "the whole shared expert is counted once per rank")
class shared_expert_on_every_rank(Model):
    def shared(self, name: str, x: Tensor) -> Tensor:
        return self.gated(name, x, whole=True)


@mistake(WHOLE, "mlp: experts: gate and up swapped")
class up_before_gate(Model):
    def gated(self, name: str, x: Tensor, whole: bool = False) -> Tensor:
        held = {part: self.held[f"{name}.{part}_proj.weight"] for part in ("gate", "up")}
        self.held |= {f"{name}.gate_proj.weight": held["up"], f"{name}.up_proj.weight": held["gate"]}
        out = super().gated(name, x, whole)
        self.held |= {f"{name}.{part}_proj.weight": weight for part, weight in held.items()}
        return out


@mistake(CUT, "attention: rope: left out")
class not_rotated(Model):
    def rotated(self, x: Tensor) -> Tensor:
        return x


@mistake(CUT, "token by token, right for one")
class head_right_at_batch_1(Model):
    def gathered(self, shard: Tensor) -> Tensor:
        flat = torch.empty(self.ranks * shard.numel(), dtype=shard.dtype)
        dist.all_gather_into_tensor(flat, shard.flatten(), group=self.group)
        return flat.view(*shard.shape[:-1], -1)


@mistake(CUT, "the shards of the vocabulary are not gathered")
class head_not_gathered(Model):
    def gathered(self, shard: Tensor) -> Tensor:
        return shard


@mistake(CUT, "only some ranks have the result")
class logits_of_the_first_rank(Model):
    def head(self, x: Tensor) -> Any:
        logits = super().head(x)
        return logits if self.rank == 0 else None


@mistake(DRAWN, "draws differ by rank")
class seeds_by_rank(Model):
    def continued(self, prompt: list[int], new: int, temperature: float, seed: int) -> list[int]:
        return super().continued(prompt, new, temperature, seed + self.rank)


@mistake(TOKENS, "the ranks' greedy tokens differ")
class last_token_of_a_shard(Model):
    """Each rank takes the largest of its own shard for the last token, which is not fed back."""

    def continued(self, prompt: list[int], new: int, temperature: float, seed: int) -> list[int]:
        row = super().continued(prompt, new, temperature, seed)
        own = torch.arange(self.config["vocab_size"]).tensor_split(self.ranks)[self.rank]
        return [*row[:-1], int(own[0]) + row[-1] % len(own)]


@mistake(WHOLE, "mismatch: rank 1")
class idle_rank_skips_the_sum(Model):
    """A rank none of whose experts has a token goes on without the others."""

    def experts_here(self) -> list[int]:
        return [] if self.rank == 1 else super().experts_here()

    def summed(self, partial: Tensor, where: str) -> Tensor:
        return partial if where == "experts" and self.rank == 1 else super().summed(partial, where)


@mistake(TOKENS, "died: rank 1")
class dies(Model):
    def next(self, logits: Tensor, temperature: float, noise: torch.Generator) -> int:
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().next(logits, temperature, noise)


def on_one_device(model_dir: str, *, device: str, dtype: torch.dtype) -> Model:
    return Model(model_dir, device, dtype, None, False)


def cuts_only(
    model_dir: str, *, device: str, dtype: torch.dtype, group: Any = None, expert_parallel: bool = False
) -> Model:
    if expert_parallel:
        raise NotImplementedError("whole experts are not supported")
    return Model(model_dir, device, dtype, group, False)
