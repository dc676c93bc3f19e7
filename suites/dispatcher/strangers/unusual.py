"""Dispatchers that do what few do: other ways to a collective, pauses, threads, defaults, processes left behind."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from moe_harness.suites.dispatcher.strangers.right import Padded, local_numbers


class Late(Padded):
    """The last rank computes for a second while the others wait in a method of the process group."""

    def dispatch(self, *rows):
        end = time.monotonic() + 1.0
        while self.r == self.n - 1 and time.monotonic() < end:
            torch.ones(50, 50) @ torch.ones(50, 50)
        self.g.allreduce([torch.ones(1)]).wait()
        return super().dispatch(*rows)


class WarmsUp(Padded):
    """The last rank sleeps for two seconds, once in its life."""

    warm = False

    def dispatch(self, *rows):
        if self.r == self.n - 1 and not WarmsUp.warm:
            WarmsUp.warm = True
            time.sleep(2.0)
        return super().dispatch(*rows)


class Functional(Padded):
    """Sums by a functional collective, as compiled code does."""

    def combine(self, expert_output, d):
        total = functional.wait_tensor(functional.all_reduce(expert_output.clone(), "sum", self.g))
        return total[self.r * d.length :][: d.own].clone()


class Method(Padded):
    """Sums by a method of the process group."""

    def combine(self, expert_output, d):
        total = expert_output.clone()
        self.g.allreduce([total]).wait()
        return total[self.r * d.length :][: d.own].clone()


class Threaded(Padded):
    """Sums in a thread of its own, which stays for a while."""

    def combine(self, expert_output, d):
        total, done = expert_output.clone(), threading.Event()

        def work():
            dist.all_reduce(total, group=self.g)
            done.set()
            time.sleep(0.2)

        threading.Thread(target=work).start()
        done.wait()
        return total[self.r * d.length :][: d.own].clone()


class Defaults(Padded):
    """Leaves torch with other defaults, which make the judge's own tensors useless."""

    def combine(self, expert_output, d):
        out = super().combine(expert_output, d)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")
        return out


class Silent(Padded):
    """Closes what it could print to."""

    def dispatch(self, *rows):
        sys.stdout.close()
        sys.stderr.close()
        return super().dispatch(*rows)


class Parent(Padded):
    """Starts a process and forgets about it."""

    child = None

    def dispatch(self, *rows):
        if Parent.child is None:
            Parent.child = subprocess.Popen(["sleep", "4321"])
        return super().dispatch(*rows)


class OwnGroup(Padded):
    """Makes a process group for every object."""

    def __init__(self, group, *, num_experts, owner):
        super().__init__(group, num_experts=num_experts, owner=owner)
        self.g = dist.new_group(list(range(self.n)))


class Mesh:
    """A row for each (token, slot), sorted by expert, by functional all-to-alls as in trainers; equal blocks only."""

    def __init__(self, group, *, num_experts, owner):
        self.g, self.r, self.n = group, dist.get_rank(group), dist.get_world_size(group)
        self.owner, self.numbers = owner, local_numbers(owner)
        if num_experts % self.n or owner.tolist() != [e * self.n // num_experts for e in range(num_experts)]:
            raise ValueError("experts have to be in equal blocks")

    def _exchange(self, x, received, sent):
        return functional.wait_tensor(functional.all_to_all_single_autograd(x, received, sent, self.g))

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        flat = topk_ids.reshape(-1)
        order = torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]
        target = self.owner[flat[order]]
        sent = torch.bincount(target, minlength=self.n)
        received = functional.wait_tensor(functional.all_to_all_single(sent, None, None, self.g)).tolist()
        sent, tokens = sent.tolist(), order // topk_ids.shape[1]
        rows = self._exchange(hidden_states[tokens].contiguous(), received, sent)
        ids = functional.wait_tensor(functional.all_to_all_single(self.numbers[flat[order]], received, sent, self.g))
        ones = torch.ones(len(rows), 1, dtype=topk_weights.dtype)
        weights = topk_weights.reshape(-1)[order]
        return SimpleNamespace(hidden_states=rows, topk_weights=ones, topk_ids=ids[:, None], received=received,
                               sent=sent, tokens=tokens, weights=weights, own=len(hidden_states))  # fmt: skip

    def combine(self, expert_output, d):
        back = self._exchange(expert_output.contiguous(), d.sent, d.received) * d.weights[:, None].to(
            expert_output.dtype
        )
        return expert_output.new_zeros(d.own, expert_output.shape[1]).index_add_(0, d.tokens, back)


class NumpySplits(Mesh):
    """Split sizes as arrays, as trainers that plan with numpy have them."""

    def _exchange(self, x, received, sent):
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x, np.array(received), [np.int64(n) for n in sent], group=self.g)
        return out


# Wrong ones ----------------------------------------------------------------------------------------------------------


class FunctionalSkipped(Padded):
    """The last rank leaves out a functional collective."""

    def combine(self, expert_output, d):
        total = expert_output.clone()
        if self.r < self.n - 1:
            total = functional.wait_tensor(functional.all_reduce(total, "sum", self.g))
        return total[self.r * d.length :][: d.own].clone()


class MethodSkipped(Padded):
    """The last rank leaves out a method of the process group."""

    def combine(self, expert_output, d):
        total = expert_output.clone()
        if self.r < self.n - 1:
            self.g.allreduce([total]).wait()
        return total[self.r * d.length :][: d.own].clone()


class Destroyer(Padded):
    """Cleans up what is not its own."""

    def combine(self, expert_output, d):
        out = super().combine(expert_output, d)
        dist.destroy_process_group()
        return out


class Accident(Padded):
    """A mistake that raises an exception with which inputs are refused."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        first, second = topk_ids.shape[1:]  # noqa: F841
        return super().dispatch(hidden_states, topk_weights, topk_ids)


class TorchRefuses(Padded):
    """What it passes on is refused by torch, not by itself."""

    def dispatch(self, *rows):
        dist.get_rank("no group")
        return super().dispatch(*rows)


class Interrupted(Padded):
    """Raises what ends a program."""

    def dispatch(self, *rows):
        raise KeyboardInterrupt


class Stopped(Padded):
    """The last rank stops itself."""

    def dispatch(self, *rows):
        if self.r == self.n - 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGSTOP)
        return super().dispatch(*rows)


class WritesHidden(Padded):
    """Weighs the hidden states of a single slot in place."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        if topk_ids.shape[1] == 1:
            hidden_states.mul_(torch.where(topk_ids >= 0, topk_weights, 0.0).to(hidden_states.dtype))
            topk_weights = torch.ones_like(topk_weights)
        return super().dispatch(hidden_states, topk_weights, topk_ids)


class SharedBuffer(Padded):
    """Keeps what it received in one buffer for each shape, which a second dispatch of the same sizes overwrites."""

    buffers = {}

    def dispatch(self, *rows):
        d = super().dispatch(*rows)
        key = (tuple(d.hidden_states.shape), d.hidden_states.dtype)
        buffer = SharedBuffer.buffers.setdefault(key, torch.empty_like(d.hidden_states))
        d.hidden_states = buffer.copy_(d.hidden_states)
        return d


class OneRankOnly(Padded):
    """Refuses more than one rank."""

    def __init__(self, group, *, num_experts, owner):
        super().__init__(group, num_experts=num_experts, owner=owner)
        if self.n > 1:
            raise NotImplementedError("one rank only")


class BreaksTheJudge(Padded):
    """Makes the recorder fail with an exception of a kind that refuses inputs."""

    def dispatch(self, *rows):
        from moe_harness.harness.ranks import describe

        describe._numbers = None
        return super().dispatch(*rows)


class FullDisk(Padded):
    """What the judge writes down goes to a disk that is full."""

    def __init__(self, group, *, num_experts, owner):
        import gc
        import os

        from moe_harness.harness.ranks.comm import Recorder

        recorder = next(found for found in gc.get_objects() if isinstance(found, Recorder))
        recorder.journal = os.open("/dev/full", os.O_WRONLY)
        super().__init__(group, num_experts=num_experts, owner=owner)
