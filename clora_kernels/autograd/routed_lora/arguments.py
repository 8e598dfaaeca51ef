"""Checks of the arguments of routed LoRA: each error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...kernels.routed_lora.algebra import Projection

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_SEEDS = torch.iinfo(torch.int64)
_MACHINE_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def check_tensor(name: str, t: Any, device: torch.device | None = None, floating: bool = True, of: str = "x") -> None:
    """TypeError unless ``t`` is a strided (floating-point) tensor, ValueError unless it lies on ``device``, that of
    ``of``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor")
    if floating and t.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {t.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    check_layout(name, t)
    if device is not None and t.device != device:
        raise ValueError(f"{name}: got device {t.device}, expected {device}, the device of {of}")


def check_layout(name: str, t: Tensor) -> None:
    """TypeError for a sparse tensor and the like, which kernels cannot read."""
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {t.layout}, expected {torch.strided}")


def check_shape(name: str, t: Tensor, expected: tuple[Any, ...], meaning: str) -> None:
    if tuple(t.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {expected} = {meaning}")


def check_x(x: Any) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: got a 0-dim tensor, expected [..., in_features]")


def check_projection(x: Tensor, j: Projection, prefix: str = "") -> None:
    """Check the tensors of one projection of ``x``; seed, threshold and scaling are checked where they are made."""
    without_options = j.routing is j.frozen_routing is j.routing_index is j.gate is j.base_output is None
    if without_options and is_plain_layer(x, j.weight, j.lora_A, j.lora_B, j.bias):
        return
    K = x.shape[-1]
    check_tensor(prefix + "lora_A", j.lora_A, x.device)
    check_tensor(prefix + "lora_B", j.lora_B, x.device)
    if j.lora_A.dim() != 2 or j.lora_A.shape[1] != K:
        raise ValueError(f"{prefix}lora_A: got shape {tuple(j.lora_A.shape)}, expected (r, {K}) = (rank, in_features)")
    r = j.lora_A.shape[0]
    if r == 0:
        raise ValueError(f"{prefix}lora_A: got rank 0, expected a rank of at least 1")
    N = _check_weight(x, j.weight, prefix)
    if j.lora_B.dim() != 2 or j.lora_B.shape[1] != r or (N is not None and j.lora_B.shape[0] != N):
        expected = f"({'N' if N is None else N}, {r}) = (out_features, rank)"
        raise ValueError(f"{prefix}lora_B: got shape {tuple(j.lora_B.shape)}, expected {expected}")
    N = j.lora_B.shape[0]
    if j.bias is not None:
        check_tensor(prefix + "bias", j.bias, x.device)
        check_shape(prefix + "bias", j.bias, (N,), "(out_features,)")
    if j.base_output is not None:
        check_tensor(prefix + "base_output", j.base_output, x.device)
        check_shape(prefix + "base_output", j.base_output, (*x.shape[:-1], N), "x.shape[:-1] + (out_features,)")
    _check_routing(x, j, r, prefix)
    if j.gate is not None:
        check_tensor(prefix + "gate", j.gate, x.device)
        _check_broadcast(prefix + "gate", j.gate, (*x.shape[:-1], r))


def is_plain_layer(x: Tensor, weight: Any, lora_A: Any, lora_B: Any, bias: Any) -> bool:
    """Whether a layer without options passes every check: found in a fifth of the time that it takes to say what is
    wrong."""
    if not (isinstance(weight, Tensor) and isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor)):
        return False
    shape, device = weight.shape, x.device
    if len(shape) != 2 or not x.dim() or shape[1] != x.shape[-1]:
        return False
    N, K = shape
    r = lora_A.shape[0] if lora_A.dim() else 0
    return (
        lora_A.shape == (r, K)
        and lora_B.shape == (N, r)
        and r > 0
        and weight.dtype == x.dtype
        and lora_A.dtype in DTYPES
        and lora_B.dtype in DTYPES
        and lora_A.layout is lora_B.layout is weight.layout is torch.strided
        and lora_A.device == lora_B.device == weight.device == device
        and (
            bias is None
            or (
                isinstance(bias, Tensor)
                and bias.shape == (N,)
                and bias.dtype in DTYPES
                and bias.layout is torch.strided
                and bias.device == device
            )
        )
    )


def _check_weight(x: Tensor, weight: Any, prefix: str) -> int | None:
    """out_features of ``weight``, None where a base layer already ran."""
    if weight is None:
        return None
    check_tensor(prefix + "weight", weight, x.device)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        expected = f"(N, {x.shape[-1]}) = (out_features, in_features of x)"
        raise ValueError(f"{prefix}weight: got shape {tuple(weight.shape)}, expected {expected}")
    if weight.dtype != x.dtype:
        raise TypeError(f"{prefix}weight: got dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    return weight.shape[0]


def _check_routing(x: Tensor, j: Projection, r: int, prefix: str) -> None:
    if j.routing is None:
        for name in ("frozen_routing", "routing_index"):
            if getattr(j, name) is not None:
                raise ValueError(f"{prefix}{name}: got a tensor without routing, expected routing beside it")
        return
    check_tensor(prefix + "routing", j.routing, x.device)
    if j.routing.dim() not in (2, 3) or j.routing.shape[-2:] != (r, r) or j.routing.shape[0] == 0:
        raise ValueError(
            f"{prefix}routing: got shape {tuple(j.routing.shape)}, expected ({r}, {r}) or a bank (T, {r}, {r})"
        )
    if j.frozen_routing is not None:
        check_tensor(prefix + "frozen_routing", j.frozen_routing, x.device)
        check_shape(prefix + "frozen_routing", j.frozen_routing, tuple(j.routing.shape), "the shape of routing")
        if j.frozen_routing.requires_grad:
            raise ValueError(f"{prefix}frozen_routing: got requires_grad=True, expected a constant; pass it detached")
    if (j.routing.dim() == 3) != (j.routing_index is not None):
        got = "none" if j.routing_index is None else "one"
        raise ValueError(
            f"{prefix}routing_index: got {got} with routing of shape {tuple(j.routing.shape)}, expected an index [S] "
            "with a bank [T, r, r] and none with a single [r, r]"
        )
    if j.routing_index is not None:
        check_tensor(prefix + "routing_index", j.routing_index, x.device, floating=False)
        if j.routing_index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{prefix}routing_index: got dtype {j.routing_index.dtype}, expected int64 or int32")
        if x.dim() < 2:
            raise ValueError(f"{prefix}routing_index: got x of shape {tuple(x.shape)}, expected [S, ..., in_features]")
        check_shape(prefix + "routing_index", j.routing_index, (x.shape[0],), "(x.shape[0],), one routing a sample")


def _check_broadcast(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    trailing = zip(reversed(t.shape), reversed(shape), strict=False)
    if t.dim() > len(shape) or any(mine not in (1, theirs) for mine, theirs in trailing):
        raise ValueError(
            f"{name}: got shape {tuple(t.shape)}, expected one that broadcasts to {shape} = x.shape[:-1] + (rank,)"
        )


def _is_number(value: Any) -> bool:
    if type(value) is float:  # isinstance of an abstract class takes ten times as long
        return True
    return isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def scaling_tensor(scaling: Any, x: Tensor, prefix: str = "") -> Tensor:
    """``scaling`` as a 0-dim tensor. A float enters operators only so: as an argument it would recompile for each
    value."""
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or scaling.dtype not in DTYPES:
            raise ValueError(
                f"{prefix}scaling: got {scaling.dtype} of shape {tuple(scaling.shape)}, expected a number or a 0-dim "
                "float tensor"
            )
        check_layout(f"{prefix}scaling", scaling)
        if scaling.device != x.device and not scaling.is_cpu:
            raise ValueError(f"{prefix}scaling: got device {scaling.device}, expected {x.device} or cpu")
        return scaling
    if not _is_number(scaling):
        raise TypeError(f"{prefix}scaling: got {type(scaling).__name__}, expected a number or a 0-dim float tensor")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    try:
        return _scalar(scaling if isinstance(scaling, _MACHINE_NUMBERS) else float(scaling), dtype, x.device)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"{prefix}scaling: got {scaling}, expected a number that {dtype} can hold") from error


def check_dropout(dropout_p: Any, dropout_seed: Any, x: Tensor, prefix: str = "") -> None:
    if not _is_number(dropout_p):
        raise TypeError(f"{prefix}dropout_p: got {type(dropout_p).__name__}, expected a number from 0 to 1")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{prefix}dropout_p: got {dropout_p}, expected a number from 0 to 1")
    if dropout_seed is not None:
        check_tensor(prefix + "dropout_seed", dropout_seed, x.device, floating=False)
        if dropout_seed.dtype != torch.int64 or dropout_seed.dim() != 0:
            raise ValueError(
                f"{prefix}dropout_seed: got {dropout_seed.dtype} of shape {tuple(dropout_seed.shape)}, "
                "expected a 0-dim int64 tensor"
            )


def dropout_tensors(
    dropout_p: float, dropout_seed: Tensor | None, training: bool, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, threshold) of the draw, or (None, None) where nothing drops; to be called when everything is checked. A
    seed is drawn here, outside the operator: inside, common-subexpression elimination would give two layers one mask
    and checkpointing would replay another."""
    if not training or dropout_p == 0.0:
        return None, None
    if dropout_seed is None:
        dropout_seed = draw_seed(x.device)
    if torch.compiler.is_compiling():
        return dropout_seed, (_scalar(dropout_p, torch.float64, x.device) * 65536).round().to(torch.int64)
    return dropout_seed, _scalar(round(65536 * dropout_p), torch.int64, x.device)


def draw_seed(device: torch.device) -> Tensor:
    """A seed of torch's generator."""
    return torch.randint(_SEEDS.min, _SEEDS.max, (), dtype=torch.int64, device=device)


def _scalar(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor of ``value``: on the CPU in eager mode, where ATen reads it without a copy or a launch."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value  # full() would compile a graph for each value
    traced = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    if traced or not isinstance(value, (float, int)):  # a mode would keep what is its own, and a SymFloat has no hash
        return torch.full((), value, dtype=dtype, device="cpu")
    return _kept_scalar(value, dtype)


@lru_cache(maxsize=1024)
def _kept_scalar(value: Any, dtype: torch.dtype) -> Tensor:
    # made once: in a layer of one row it would take longer than the product of rank r
    # a tensor of inference mode could not be saved for backward later, one that a mode made be anything
    with torch.inference_mode(False), torch._C.DisableTorchFunction():
        return torch.full((), value, dtype=dtype, device="cpu")
