"""Who is measured: the frozen linear layer, routed LoRA, PEFT's layers, the addmm chain, and installed peer kernels.

All of them get the same problem: frozen weight and bias, an x that wants a gradient, lora_A and lora_B in fp32 as PEFT
keeps them (in x.dtype where a contestant's docstring says so).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora_kernels import routed_lora_linear
from clora_kernels.dispatch.routed_lora import why_not_triton

from .points import Point

SCALING = 2.0
ADAPTER_SIZE = 1e-3  # |adapter| over |x·W|: where rounding twice in 16 bit loses half of an adapter


@dataclass(frozen=True)
class Problem:
    """The tensors of one point; ``seed`` replays a dropout draw where a contestant can."""

    point: Point
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    routing: Tensor
    frozen_routing: Tensor
    dy: Tensor
    seed: Tensor

    @property
    def layer(self) -> dict[str, Any]:
        """Arguments of ``routed_lora_linear`` for plain LoRA, dropout left out."""
        named = {k: getattr(self, k) for k in ("x", "weight", "lora_A", "lora_B", "bias")}
        return {**named, "scaling": SCALING}

    def without_dropout(self) -> Problem:
        return replace(self, point=replace(self.point, dropout_p=0.0))


def make_problem(point: Point, device: torch.device, seed: int = 0) -> Problem:
    """Random tensors of a point, with an adapter ``ADAPTER_SIZE`` times as large as x·W."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator) * scale

    M, K, N, r = point.M, point.K, point.N, point.r
    return Problem(
        point=point,
        x=normal(M, K).to(point.dtype),
        weight=normal(N, K, scale=K**-0.5).to(point.dtype),
        bias=normal(N, scale=0.1).to(point.dtype) if point.bias else None,
        lora_A=normal(r, K, scale=K**-0.5),
        lora_B=normal(N, r, scale=ADAPTER_SIZE / SCALING * r**-0.5),
        routing=torch.eye(r, device=device) + normal(r, r, scale=0.1 * r**-0.5),
        frozen_routing=normal(r, r, scale=0.1 * r**-0.5),
        dy=normal(M, N).to(point.dtype),
        seed=torch.tensor(1234567, device=device),
    )


@dataclass(frozen=True)
class Contestant:
    """``forward`` of x, and what backward differentiates: x, then lora_A and lora_B where there are any."""

    run: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...]
    dy: Tensor

    def forward(self) -> Tensor:
        return self.run(self.leaves[0])

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def frozen(problem: Problem) -> Contestant:
    """The yardstick: the layer without an adapter."""
    return Contestant(lambda x: F.linear(x, problem.weight, problem.bias), (_leaf(problem.x),), problem.dy)


def ours(problem: Problem, backend: str = "auto") -> Contestant:
    """``routed_lora_linear`` as plain LoRA, which is what the others compute."""
    x, A, B = map(_leaf, (problem.x, problem.lora_A, problem.lora_B))
    options = {"bias": problem.bias, "scaling": SCALING, "dropout_p": problem.point.dropout_p, "backend": backend}

    def run(x: Tensor) -> Tensor:
        return routed_lora_linear(x, problem.weight, A, B, **options)

    return Contestant(run, (x, A, B), problem.dy)


def ours_triton(problem: Problem) -> Contestant:
    """``ours`` in Triton kernels, where they run, whatever the tables say."""
    return ours(problem, backend="triton")


def ours_clora(problem: Problem) -> Contestant:
    """``routed_lora_linear`` as C-LoRA: a live and a frozen routing, and the gradient of the live one."""
    x, A, B, R = map(_leaf, (problem.x, problem.lora_A, problem.lora_B, problem.routing))
    options = {"bias": problem.bias, "frozen_routing": problem.frozen_routing, "scaling": SCALING}
    options["dropout_p"] = problem.point.dropout_p

    def run(x: Tensor) -> Tensor:
        return routed_lora_linear(x, problem.weight, A, B, R, **options)

    return Contestant(run, (x, A, B, R), problem.dy)


class _AddmmChain(torch.autograd.Function):
    """LoRA as hand-written libraries chain it: the frozen matmul, then addmm_ of the low-rank term onto its output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, dropout_p: float
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        y = F.linear(x, weight, bias)
        y.addmm_(dropped @ A.to(x.dtype).mT, B.to(x.dtype).mT, alpha=SCALING)
        ctx.save_for_backward(dropped, mask, weight, A, B)
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, weight, A, B = ctx.saved_tensors
        A_small, B_small = A.to(dy.dtype), B.to(dy.dtype)
        h = (dy @ B_small).mul_(SCALING)
        dA = h.mT @ dropped
        dB = (dy.mT @ (dropped @ A_small.mT)).mul_(SCALING)
        dx = dy @ weight
        if mask is None:
            dx.addmm_(h, A_small)
        else:
            dx.add_((h @ A_small).mul_(mask), alpha=1 / (1 - ctx.dropout_p))
        return dx, None, None, dA.to(A.dtype), dB.to(B.dtype), None


def addmm_chain(problem: Problem) -> Contestant:
    """A hand-written Function around two addmm_."""
    x, A, B = map(_leaf, (problem.x, problem.lora_A, problem.lora_B))
    p = problem.point.dropout_p
    run = lambda x: _AddmmChain.apply(x, problem.weight, problem.bias, A, B, p)  # noqa: E731
    return Contestant(run, (x, A, B), problem.dy)


def _peft_layer(problem: Problem, autocast_adapter_dtype: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import cast_adapter_dtype

    N, K = problem.weight.shape
    base = nn.Linear(K, N, bias=problem.bias is not None, device="meta")
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        base.bias = nn.Parameter(problem.bias, requires_grad=False)
    r = problem.point.r
    config = LoraConfig(r=r, lora_alpha=SCALING * r, lora_dropout=problem.point.dropout_p)
    layer = Linear(base, "default", config, r=r, lora_alpha=config.lora_alpha)
    cast_adapter_dtype(layer, "default", autocast_adapter_dtype=autocast_adapter_dtype)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(problem.lora_A)
        B.copy_(problem.lora_B)
    return layer.train(), (_leaf(problem.x), A, B)


def peft(problem: Problem) -> Contestant:
    """PEFT's LoRA layer as ``get_peft_model`` leaves it: adapters in fp32, so that a 16-bit x is cast up."""
    layer, leaves = _peft_layer(problem, autocast_adapter_dtype=True)
    return Contestant(layer, leaves, problem.dy)


def peft_16bit(problem: Problem) -> Contestant:
    """PEFT's LoRA layer with ``autocast_adapter_dtype=False``: adapters in x.dtype."""
    layer, leaves = _peft_layer(problem, autocast_adapter_dtype=False)
    return Contestant(layer, leaves, problem.dy)


def peft_compiled(problem: Problem) -> Contestant:
    """PEFT's LoRA layer with ``autocast_adapter_dtype=False``, adapters in x.dtype, under ``torch.compile``."""
    torch._dynamo.reset()
    layer, leaves = _peft_layer(problem, autocast_adapter_dtype=False)
    return Contestant(torch.compile(layer, dynamic=False), leaves, problem.dy)


def unsloth(problem: Problem) -> Contestant:
    """Unsloth's ``LoRA_W``, which takes x of three dimensions and no bias."""
    from unsloth.kernels.fast_lora import LoRA_W

    x, A, B = map(_leaf, (problem.x, problem.lora_A, problem.lora_B))
    run = lambda x: LoRA_W.apply(x[None], problem.weight, None, A, B, SCALING)[0]  # noqa: E731
    return Contestant(run, (x, A, B), problem.dy)


def lorafusion(problem: Problem) -> Contestant:
    """LoRAFusion's ``fused_linear_lora``, which takes x of three dimensions and adapters in x.dtype."""
    from lorafusion.ops.lora_v1 import fused_linear_lora

    dtype = problem.x.dtype
    x, A, B = map(_leaf, (problem.x, problem.lora_A.to(dtype), problem.lora_B.to(dtype)))
    run = lambda x: fused_linear_lora(  # noqa: E731
        x[None], problem.weight, A, B, SCALING, dropout_p=problem.point.dropout_p, linear_bias=problem.bias
    )[0]
    return Contestant(run, (x, A, B), problem.dy)


Builder = Callable[[Problem], Contestant]
YARDSTICK, OURS = {"frozen": frozen}, {"ours": ours, "ours_triton": ours_triton, "ours_clora": ours_clora}
BASELINES: dict[str, Builder] = {
    "peft": peft,
    "peft_16bit": peft_16bit,
    "addmm_chain": addmm_chain,
    "peft_compiled": peft_compiled,
}
PEERS: dict[str, Builder] = {"unsloth": unsloth, "lorafusion": lorafusion}
BUILDERS: dict[str, Builder] = {**YARDSTICK, **OURS, **BASELINES, **PEERS}


def why_not(name: str, point: Point, device: torch.device) -> str | None:
    """Why a contestant cannot take part at a point; None if it can."""
    if name == "ours_triton":
        return why_not_triton(point.dtype, device.type, device.index) or None
    if name == "peft_16bit" and point.dtype == torch.float32:
        return "the same as peft in fp32"
    if name.startswith("peft") and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if name in PEERS:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        if device.type != "cuda":
            return f"{name} runs on a GPU alone"
        if name == "unsloth" and (point.bias or point.dropout_p):
            return "unsloth's LoRA_W has neither bias nor dropout"
    return None
