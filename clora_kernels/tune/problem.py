"""The tensors of a call that is measured, and the proof that a backend computes it right."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..autograd.routed_lora import RoutedLoRA, routed_lora_linear_group
from ..kernels.routed_lora.tables import Call
from ..kernels.routed_lora.tiles import NAMES, rows_of
from ..reference import routed_lora as reference
from ..testing import Expected, assert_fidelity, poisoned_empty

OPTIONS = ("", "dropout", "frozen", "frozen+dropout")
"""The options of calls that can be measured: dropout, and beside a live routing a frozen one, as in C-LoRA."""

DTYPES = {name: dtype for dtype, name in NAMES.items()}
DROPOUT_P = 0.1
SCALING = 0.75

Layer = dict[str, Any]


class Problem:
    """One layer, or a group of them, with frozen weights and an adapter as large as x·W; in backward x, lora_A, lora_B
    and a live routing learn. M is the most rows of the call's bucket.

    Proofs take one row less, a number that no block divides.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.device, self.M = call, device, rows_of(call.bucket)[1]
        dtype, generator = DTYPES[call.dtype], torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * scale

        r, K = call.r, call.K
        self.x = normal(self.M, K).to(dtype)
        self.dys = [normal(self.M, N).to(dtype) for N in call.N]
        self.layers: list[Layer] = []
        for N in call.N:
            layer: Layer = {
                "weight": normal(N, K, scale=K**-0.5).to(dtype),
                "lora_A": normal(r, K, scale=K**-0.5),
                "lora_B": normal(N, r, scale=r**-0.5),
                "scaling": SCALING,
            }
            if "frozen" in call.options:
                layer |= {name: normal(r, r, scale=r**-0.5) for name in ("routing", "frozen_routing")}
            if "dropout" in call.options:
                layer |= {"dropout_p": DROPOUT_P, "dropout_seed": torch.tensor(len(self.layers) + 1, device=device)}
            self.layers.append(layer)
        self.learning = ["lora_A", "lora_B", *(["routing"] if "frozen" in call.options else [])]

    def step(
        self, backend: str, rows: int
    ) -> tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], tuple[Tensor, ...]]]:
        """Forward and backward of the first ``rows`` rows, to be timed, or to be run once."""
        x = self.x[:rows].detach().requires_grad_()
        leaves = [
            {k: v.detach().requires_grad_() if k in self.learning else v for k, v in layer.items()}
            for layer in self.layers
        ]
        adapters, dys = [RoutedLoRA(**leaf) for leaf in leaves], [dy[:rows] for dy in self.dys]
        wanted = [x, *(leaf[name] for leaf in leaves for name in self.learning)]

        def forward() -> list[Tensor]:
            return routed_lora_linear_group(x, adapters, backend=backend)

        def backward(ys: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(ys, wanted, dys)

        return forward, backward

    def check(self, backend: str) -> None:
        """AssertionError unless y and every gradient keep the rule of parity, and a small adapter comes through whole,
        with whatever comes uninitialised from torch filled with NaN."""
        rows = self.M - 1
        with poisoned_empty():
            forward, backward = self.step(backend, rows)
            ys = forward()
            dx, *gradients = backward(ys)
        names = [f"{name}.{j}" for j in range(len(self.layers)) for name in self.learning]
        results = {"y": torch.cat([y.detach() for y in ys], -1), "x": dx, **dict(zip(names, gradients, strict=True))}
        self._expected.check(results)
        del ys, results
        x = self.x[:rows]
        # as small as the rounding of so many numbers lets it be seen
        small = [{**layer, "scaling": SCALING * self._small(layer, rows)} for layer in self.layers]
        with poisoned_empty(), torch.no_grad():
            ys = routed_lora_linear_group(x, [RoutedLoRA(**layer) for layer in small], backend=backend)
        for y, layer, base in zip(ys, small, self._frozen, strict=True):
            adapter = {k: v for k, v in layer.items() if k != "weight"}
            assert_fidelity(y, x, None, base_output=base, **adapter)

    @staticmethod
    def _small(layer: Layer, rows: int) -> float:
        return max(1e-3, 0.3 / math.sqrt(rows * layer["weight"].shape[0]))

    @cached_property
    def _expected(self) -> Expected:
        rows = self.M - 1
        inputs = {"x": self.x[:rows]} | {f"{k}.{j}": v for j, layer in enumerate(self.layers) for k, v in layer.items()}
        gradients = ["x", *(f"{name}.{j}" for j in range(len(self.layers)) for name in self.learning)]
        dy = torch.cat([dy[:rows] for dy in self.dys], -1)
        return Expected.of(inputs, dy=dy, gradients=gradients, reference=SideBySide())

    @cached_property
    def _frozen(self) -> list[Tensor]:
        """x·W of each layer in fp64."""
        x = self.x[: self.M - 1].double()
        return [x @ layer["weight"].double().mT for layer in self.layers]


class SideBySide:
    """The reference of several layers of one x: arguments "weight.0", "lora_A.0", ..; their outputs in a row, dx summed
    over the layers."""

    @staticmethod
    def forward(x: Tensor, **arguments: Any) -> Tensor:
        return torch.cat([reference.forward(x, **layer) for layer in _layers(arguments)], -1)

    @staticmethod
    def backward(dy: Tensor, x: Tensor, **arguments: Any) -> Any:
        layers = _layers(arguments)
        parts = dy.split([layer["lora_B"].shape[0] for layer in layers], -1)
        found: dict[str, Tensor | None] = {}
        dx = torch.zeros_like(x, dtype=reference.accumulation_dtype(x.dtype))
        for j, (layer, part) in enumerate(zip(layers, parts, strict=True)):
            gradients = reference.backward(part, x, **layer)
            dx += gradients.x
            found |= {f"{name}.{j}": getattr(gradients, name) for name in ("lora_A", "lora_B", "routing")}
        return SimpleNamespace(_asdict=lambda: {"x": dx.to(x.dtype), **found})


def _layers(arguments: dict[str, Any]) -> list[Layer]:
    layers: dict[str, Layer] = {}
    for place, value in arguments.items():
        name, _, j = place.rpartition(".")
        layers.setdefault(j, {})[name] = value
    return list(layers.values())
