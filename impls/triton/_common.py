"""What every kernel module shares: where it runs, tiles of weights, exponentials, products."""

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether the kernels run under Triton's interpreter (on the CPU), which multiplies bf16 operands wrongly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}


def require(*tensors: Tensor) -> None:
    """Refuse what the kernels cannot run: other dtypes than fp32, fp16, bf16, mixed dtypes, CPU without interpreter.

    Raises:
        TypeError: a dtype outside the three, or two dtypes at once.
        NotImplementedError: tensors on a device that cannot run the kernels.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}, but should be one of fp32, fp16, bf16")
    if any(t.dtype != dtype for t in tensors):
        raise TypeError(f"dtypes are {[t.dtype for t in tensors]}, but should be equal")
    if device.type != "cuda" and not interpreting():
        raise NotImplementedError(f"device is {device}, but Triton kernels need CUDA (or TRITON_INTERPRET=1)")


def require_scale(x: Tensor, *scales: Tensor) -> None:
    """TypeError where the weight of a norm is neither in the dtype of x nor fp32, as sums with 1 are kept."""
    if any(scale.dtype not in (x.dtype, torch.float32) for scale in scales):
        raise TypeError(f"weights of norms are {[s.dtype for s in scales]}, but should be {x.dtype} or fp32")


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` current while a kernel is launched: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Whether the kernels written for Hopper run: on such a GPU, with a Triton whose Gluon has what they need."""
    if device.type != "cuda" or interpreting() or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import moe_harness.impls.triton._hopper  # noqa: F401 - importing it is the question
    except ImportError:
        return False
    return True


def programs_at_once(device: torch.device) -> int:
    """How many multiprocessors a persistent grid should fill; a handful under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def early_start(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one it depends on has ended (programmatic dependent launch).

    Every kernel that does waits before it reads or writes what the kernel before it touches.  The first kernel of a
    call waits before everything else, and only then lets the next one start: so all that was in the stream before the
    call has ended when the second kernel begins, which may read the operands of the call at once.  (With the two the
    other way round, a decoding step's second product read ids that the router was still writing.)
    """
    return device.type == "cuda" and not interpreting() and torch.cuda.get_device_capability(device)[0] >= 9


def descriptor_strides(t: Tensor) -> list[int] | None:
    """Strides for a tensor-memory descriptor of `t`, or None where the layout does not allow one.

    The copy engine wants a contiguous last dimension, a 16-byte aligned base and strides that are multiples of 16
    bytes.  A dimension of size 1 may carry any stride, so it gets one that fits.
    """
    if t.device.type != "cuda" or interpreting() or torch.cuda.get_device_capability(t.device)[0] < 9:
        return None
    size = t.element_size()
    if t.data_ptr() % 16 or t.stride(-1) != 1 or min(t.shape) < 1:
        return None
    strides = [s if n > 1 else 16 for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)] + [1]
    return strides if all(s > 0 and s * size % 16 == 0 for s in strides[:-1]) else None


def tile_source(t: Tensor, block: list[int], wanted: bool) -> tuple[object, bool]:
    """(descriptor, True) to load tiles of shape `block` through the copy engine, else (`t` itself, False)."""
    strides = descriptor_strides(t) if wanted else None
    if strides is None:
        return t, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), strides, block), True


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel of the call occupy multiprocessors that this one no longer fills."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait until the previous kernel has ended and its writes are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def exact_exp(x):
    """exp(x) in fp32 within about 2 ulp.

    exp2(x * log2(e)) alone loses |x * log2(e)| ulp to the rounding of the product: 30 ulp at x = 20.  The remainder
    of the product, from a fused multiply-add, corrects it.
    """
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950408889634, -high) + x * 1.925963033500011e-8
    scaled = tl.exp2(high)
    correction = low * 0.6931471805599453
    return tl.where(tl.abs(correction) < 1.0, scaled + scaled * correction, scaled)


@triton.jit
def exact_sigmoid(x):
    """sigmoid(x) in fp32 without overflow: exp of a number that is never positive; NaN stays NaN."""
    small = exact_exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


@triton.jit
def quick_sigmoid(x):
    """sigmoid(x) within about |x| ulp of fp32, for results rounded to 16 bits: half the instructions, one division."""
    small = tl.exp2(tl.abs(x) * -1.4426950408889634)
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def gated(g, u, GELU: tl.constexpr, TO: tl.constexpr):
    """act(g) * u in fp32, good enough to be rounded to dtype TO.

    gelu_tanh(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)), an identity.
    """
    z = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    return g * (exact_sigmoid(z) if tl.float32 == TO else quick_sigmoid(z)) * u


@triton.jit
def product(a, b, acc, WIDEN: tl.constexpr):
    """acc + a @ b in fp32; WIDEN under the interpreter, whose product of bf16 operands is wrong by up to 1e10."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, TO: tl.constexpr, WIDEN: tl.constexpr):
    """fp32 x in dtype TO, rounded to nearest even; the interpreter would cut bf16 off, which biases by 0.3 %."""
    if WIDEN and tl.bfloat16 == TO:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(TO)
