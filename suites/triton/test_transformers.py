"""The Triton experts inside transformers: tiny random models give the eager path's logits and tokens.

On the CPU the kernels run under the interpreter (TRITON_INTERPRET=1), on a GPU as they are; continuous batching sizes
its cache by the memory of a GPU and so is tested there only.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.experts.bound import experts_bound
from moe_harness.impls.triton import hf
from moe_harness.suites.triton import CUDA, DEVICE, runnable

transformers = pytest.importorskip("transformers")
pytestmark = runnable

DTYPE = torch.bfloat16 if CUDA else torch.float32
TOKENS = 24 if CUDA else 4
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "max_position_embeddings": 256,
}  # fmt: skip
PROMPTS = [[5, 17, 60, 3, 9], [70, 2], [33, 34, 35, 36, 37, 38, 39]]


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    """A Qwen3-MoE in fp32: in bf16 the two paths round differently, and greedy tokens of random weights flip."""
    hf.register()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES)
    return transformers.Qwen3MoeForCausalLM(config).eval().to(DEVICE)


def experts_of(family: str = "qwen3_moe", dtype: torch.dtype = DTYPE, **config: object) -> torch.nn.Module:
    """The experts of a tiny layer with random weights."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if family == "gpt_oss":
        module = GptOssExperts(transformers.GptOssConfig(hidden_size=32, intermediate_size=16, num_local_experts=4))
    else:
        module = Qwen3MoeExperts(transformers.Qwen3MoeConfig(**SIZES | config))
    draw = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        weight.data = (torch.randn(weight.shape, generator=draw) * weight.shape[-1] ** -0.5).to(DEVICE, dtype)
    return module.to(DEVICE)


def batch(tokens: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states, top_k_index, top_k_weights of six experts."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 32, generator=draw).to(DEVICE, DTYPE)
    top = torch.rand(tokens, 6, generator=draw).topk(2, dim=-1)
    return x, top.indices.to(DEVICE), top.values.to(DEVICE, DTYPE)


def worst(module: torch.nn.Module, out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> float:
    """Largest error of a layer's result in sigmas of the kernels' own bound."""
    args = (x, module.gate_up_proj, module.down_proj, w, ids)
    bound = experts_bound(*args, activation="silu", expert_map=None, declared=hf.experts.rounds)
    return float(bound.z(out).abs().nan_to_num(float("inf")).amax())


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_layer_is_right(transposed: bool) -> None:
    """Transposed weights [E, H, 2I] and [E, I, H] are read through their strides."""
    module = experts_of()
    x, ids, w = batch()
    run = copy.deepcopy(module)
    if transposed:
        run.is_transposed = True
        for name in ("gate_up_proj", "down_proj"):
            getattr(run, name).data = getattr(run, name).data.transpose(1, 2).contiguous()
    assert worst(module, hf.forward(run, x, ids, w), x, ids, w) <= bounds.max_limit()


@pytest.mark.parametrize("ranks", [2, 3, 6])
@torch.no_grad()
def test_ranks_under_expert_parallelism_add_up(ranks: int) -> None:
    """Each rank holds a slice of the experts and gets the ids and weights that transformers' own hook makes."""
    from transformers.distributed.tensor_parallel import EpRouterParallel

    whole, (x, ids, w) = experts_of(dtype=torch.float32), batch()
    x, w = x.float(), w.float()
    size, total = 6 // ranks, torch.zeros_like(x)
    for rank in range(ranks):
        part = experts_of(num_experts=size, dtype=torch.float32)
        part.gate_up_proj.data = whole.gate_up_proj.data[rank * size : (rank + 1) * size]
        part.down_proj.data = whole.down_proj.data[rank * size : (rank + 1) * size]
        mesh = SimpleNamespace(get_local_rank=lambda rank=rank: rank, size=lambda: ranks)
        router = SimpleNamespace(num_experts=6)
        _, scores, local = EpRouterParallel.transform_output_post_forward(None, router, (None, w, ids), mesh)
        assert bool((local == size).any()), "no slot is another rank's: the test shows nothing"
        total += hf.forward(part, x, local, scores)
    assert worst(whole, total, x, ids, w) <= bounds.max_limit()


def test_layouts_that_it_cannot_run_are_refused() -> None:
    module = experts_of("gpt_oss")
    with pytest.raises(NotImplementedError, match="has_bias is True.*choose another experts_implementation"):
        hf.forward(module, *batch())
    module.has_bias = False
    with pytest.raises(NotImplementedError, match="is_concatenated is False"):
        hf.forward(module, *batch())
    module.is_concatenated = True
    with pytest.raises(NotImplementedError, match="its own GptOssExperts._apply_gate"):
        hf.forward(module, *batch())


def test_other_activations_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="act_fn is GELUActivation"):
        hf.forward(experts_of(hidden_act="gelu"), *batch())


@torch.no_grad()
def test_logits_are_as_near_to_fp64_as_the_eager_paths(model: transformers.PreTrainedModel) -> None:
    ids = torch.tensor(PROMPTS[2:], device=DEVICE)
    errors = {}
    model.set_experts_implementation("eager")
    wide = model.double()(ids).logits
    model.float()
    for implementation in ("eager", hf.NAME):
        model.set_experts_implementation(implementation)
        errors[implementation] = float((model(ids).logits - wide).abs().max())
    assert 0 < errors[hf.NAME] <= 4 * errors["eager"]


def test_generate_gives_the_eager_paths_tokens(model: transformers.PreTrainedModel) -> None:
    assert greedy(model, hf.NAME, TOKENS) == greedy(model, "eager", TOKENS)


@pytest.mark.parametrize("family", ["Qwen2Moe", "Mixtral"])
def test_other_families_generate_the_eager_paths_tokens(family: str) -> None:
    """With a shared expert, without renormalised weights, under the names of another family."""
    hf.register()
    torch.manual_seed(1)
    sizes = SIZES | {"norm_topk_prob": False, "shared_expert_intermediate_size": 24, "num_local_experts": 6}
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    model = model.eval().to(DEVICE)
    assert greedy(model, hf.NAME, TOKENS) == greedy(model, "eager", TOKENS)


def greedy(model: transformers.PreTrainedModel, implementation: str, count: int) -> list[list[int]]:
    """Greedy continuations of PROMPTS, one call each."""
    model.set_experts_implementation(implementation)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([p], device=DEVICE), **options)[0, len(p) :].tolist() for p in PROMPTS]


@pytest.mark.gpu
def test_continuous_batching_gives_the_tokens_of_generate(model: transformers.PreTrainedModel) -> None:
    """Its decoding steps are captured in CUDA graphs, with batches that grow and shrink."""
    config = transformers.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = transformers.ContinuousBatchingConfig(
        num_blocks=64, block_size=16, max_batch_tokens=64, use_cuda_graph=True
    )
    model.set_experts_implementation(hf.NAME)
    found = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=cache)
    outputs = sorted(found.values(), key=lambda o: PROMPTS.index(list(o.prompt_ids)))
    assert [o.error for o in outputs] == [None] * len(PROMPTS)
    assert [list(o.generated_tokens) for o in outputs] == greedy(model, "eager", TOKENS)
