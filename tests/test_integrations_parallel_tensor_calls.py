"""Tensor parallel: single calls of a layer that is cut, what they drop, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from layers import function_inputs, randomize
from parallel_models import D, H, mesh_of_all, whole
from processes import run_in
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

from clora_kernels import RoutedLoRAFusedLinear, RoutedLoRALinear
from clora_kernels.integrations.parallel import ColumnParallel, RowParallel
from clora_kernels.testing import assert_parity


def layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = RoutedLoRALinear(D, H, 3, dtype=dtype, **{"scaling": 0.7, **options})
    return randomize(made)


def whole_call(made, **options):
    """y and every gradient of a call, gate included; of a sharded layer all of them as whole tensors."""
    wanted = dict(made.named_parameters())
    x, gate, dy = random_inputs(next(iter(wanted.values())).dtype)
    y = made(x.requires_grad_(), gate=gate.requires_grad_(), **options)
    gradients = torch.autograd.grad(y, [x, gate, *wanted.values()], dy)
    return {"y": whole(y)} | {n: whole(g) for n, g in zip(["x", "gate", *wanted], gradients, strict=True)}


def random_inputs(dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, n, generator=generator).to(dtype) for n in (D, 3, H)]


CALLS = {
    "single": {},
    "bank": {"routing": 3, "frozen_routing": True},
    "as Conv1D": {"conv": True},
    "fp32 adapter in 16 bit": {"dtype": torch.bfloat16},
}


def made_for(way):
    options = dict(CALLS[way])
    if not options.pop("conv", False):
        made = layer(**options)
    else:
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        made = randomize(RoutedLoRALinear.from_linear(Conv1D(H, D).double(), 3, scaling=0.7))
    index = torch.tensor([2, 0, 1, 2]) if way == "bank" else None
    return made, {"routing_index": index}


def calls():
    """Both styles as torch's own: x comes whole, y leaves whole."""
    found = {}
    for way in CALLS:
        for style in (
            ColumnParallel(output_layouts=Replicate()),
            RowParallel(input_layouts=Replicate()),
            ColumnParallel(output_layouts=Replicate(), use_local_output=False),
            RowParallel(input_layouts=Replicate(), use_local_output=False),
        ):
            made, options = made_for(way)
            parallelize_module(made, mesh_of_all(), style)
            call = whole_call_of_dtensor if not style.use_local_output else whole_call
            found[way, type(style).__name__, style.use_local_output] = call(made, **options)
    return found


def whole_call_of_dtensor(made, **options):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = made

        def forward(self, *args, **kwargs):
            y = self.made(*args, **kwargs)
            assert y.placements == (Replicate(),)
            return y.to_local()

    return {name.removeprefix("made."): t for name, t in whole_call(Whole(), **options).items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_gradient_of_a_call(ranks) -> None:
    found = run_in(ranks, calls)
    for way in CALLS:
        made, options = made_for(way)
        expected = whole_call(made, **options)
        for result in found:
            mine = [value for key, value in result.items() if key[0] == way]
            assert len(mine) == 4
            for value in mine:
                if way != "fp32 adapter in 16 bit":
                    torch.testing.assert_close(value, expected)
                    continue
                x, gate, dy = random_inputs(torch.bfloat16)
                assert value["lora_A"].dtype == torch.float32
                assert_parity(value, {**function_inputs(made, x), "gate": gate}, dy=dy, gradients=[*value][1:])


def dropped(together):
    """Of x = 1 and A = I, whose y is the mask where B is 1; ranks whose generators are in step, or are not."""
    found = {}
    for style in (ColumnParallel(output_layouts=Replicate()), RowParallel(input_layouts=Replicate())):
        made = RoutedLoRALinear(16, 4, 16, routing=False, bias=False, dropout_p=0.5, dtype=torch.float64)
        with torch.no_grad():
            made.weight.zero_()
            made.lora_A.copy_(torch.eye(16))
            made.lora_B.copy_(2.0 ** torch.arange(16))
        parallelize_module(made, mesh_of_all(), style)
        torch.manual_seed(0 if together else dist.get_rank())
        seed = torch.tensor(5)
        draws = [made(torch.ones(64, 16, dtype=torch.float64), dropout_seed=s) for s in (None, None, seed, seed)]
        words = [(y / 2).round().long() for y in draws]
        for word in words:
            assert (word == word[:, :1]).all(), "parts of out_features see different elements"
        x = torch.ones(64, 16, dtype=torch.float64, requires_grad=True)
        y = made(x, dropout_seed=seed)
        y[:, 0].sum().backward()
        bits = [(word[:, :1] >> torch.arange(16)) & 1 for word in words]
        found[type(style).__name__] = bits, (x.grad != 0).long(), made.eval()(x).detach()
    return found


@pytest.mark.parametrize("together", [True, False], ids=["generators in step", "generators apart"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_dropout(ranks, together) -> None:
    """Column-parallel ranks drop the same elements, those of a single process with their generator; row-parallel ones
    each drop their own; forward and backward alike, and a seed replays a draw."""
    found = run_in(ranks, dropped, together)
    for style in ("ColumnParallel", "RowParallel"):
        (first, second, third, fourth), gradient, off = found[0][style]
        assert all(
            torch.equal(a, b) for result in found[1:] for a, b in zip(result[style][0], found[0][style][0], strict=True)
        )
        assert torch.equal(third, fourth) and torch.equal(third, gradient)
        assert not torch.equal(first, second) and not torch.equal(first, third)
        assert torch.equal(off, torch.full_like(off, 2.0**16 - 1))
        for bits in (first, second, third):
            assert 0.4 < bits.double().mean() < 0.6
            parts = bits.chunk(ranks, 1)
            assert not any(torch.equal(parts[0], part) for part in parts[1:])
    if together:
        torch.manual_seed(0)
        alone = RoutedLoRALinear(16, 16, 16, routing=False, bias=False, dropout_p=0.5, dtype=torch.float64)
        with torch.no_grad():
            alone.weight.zero_()
            alone.lora_A.copy_(torch.eye(16))
            alone.lora_B.copy_(torch.eye(16))
        torch.manual_seed(0)
        expected = (alone(torch.ones(64, 16, dtype=torch.float64)) != 0).long()
        assert torch.equal(found[0]["ColumnParallel"][0][0], expected)


def refusals():
    mesh, said = mesh_of_all(), []

    def refused(made, style, error, match, mesh=mesh):
        before = dict(made.named_parameters())
        with pytest.raises(error, match=match):
            parallelize_module(made, mesh, style)
        assert all(p is before[name] for name, p in made.named_parameters())
        said.append(match)

    refused(layer(), ColumnParallel(), ValueError, "device_mesh: got 2 dim", init_device_mesh("cpu", (1, 2)))
    refused(RoutedLoRALinear(8, 7, 2), ColumnParallel(), ValueError, "out_features: got 7 for 2 ranks, expected a mul")
    refused(RoutedLoRALinear(7, 8, 2), RowParallel(), ValueError, "in_features: got 7 for 2 ranks, expected a multip")
    refused(nn.Linear(8, 8), RowParallel(), TypeError, "RowParallel: got Linear, expected exactly RoutedLoRALinear")
    fused = RoutedLoRAFusedLinear.from_linear(nn.Linear(8, 8), 2, slices=[(0, 4), (4, 8)])
    refused(fused, ColumnParallel(), TypeError, "got RoutedLoRAFusedLinear, expected exactly RoutedLoRALinear")
    merged = layer()
    merged.merge()
    refused(merged, ColumnParallel(), RuntimeError, "layer is merged")
    parametrized = layer()
    nn.utils.parametrizations.orthogonal(parametrized, "weight")
    refused(parametrized, ColumnParallel(), TypeError, "expected exactly RoutedLoRALinear")
    made = parallelize_module(layer(), mesh, ColumnParallel())
    refused(made, RowParallel(), TypeError, "got ColumnParallelLayer, expected exactly RoutedLoRALinear")
    with pytest.raises(ValueError, match="x: got 4 features on this rank for input_layouts=R, expected 8 of 8"):
        made(torch.ones(2, D // 2, dtype=torch.float64))
    with pytest.raises(TypeError, match="x: got list, expected a Tensor"):
        made([1.0])
    row = parallelize_module(layer(), mesh, RowParallel())
    with pytest.raises(ValueError, match=r"x: got 8 features on this rank for input_layouts=.*, expected 4 of 8"):
        row(torch.ones(2, D, dtype=torch.float64))
    for change in (made.merge, made.fold, made.fold_routing):
        with pytest.raises(ValueError, match="weight: got one that is sharded over ranks"):
            change()
    other = {name: t + 1 for name, t in layer().adapter_state_dict().items()}
    made.load_adapter_state_dict(other)
    assert all(torch.equal(whole(t), other[name]) for name, t in made.adapter_state_dict().items())
    made.reset_adapter()
    assert torch.equal(whole(made.routing), torch.eye(3).double()) and not whole(made.lora_B).any()
    return said


def test_what_cannot_be_parallel_says_so() -> None:
    assert all(len(said) == 8 for said in run_in(2, refusals))
