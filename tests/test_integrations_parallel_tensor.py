"""Tensor parallel: plans cut layers into parts, and the parts together are the layer."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from layers import randomize
from parallel_models import D, H, batch, loss_of, model, trained, trained_alone, whole
from processes import run_in
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from clora_kernels import RoutedLoRAFusedLinear, RoutedLoRALinear
from clora_kernels.integrations.parallel import ColumnParallel, RowParallel

OPTIONS = {
    "frozen": {},
    "all of it learns": {"frozen": False},
    "two routings": {"frozen_routing": True},
    "plain without bias": {"routing": False, "bias": False, "frozen": False},
    "scaling learns": {"learn_scaling": True},
}


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def plan(module, up=ColumnParallel, down=RowParallel):
    return {f"{i}.{name}": style() for i in range(len(module)) for name, style in (("up", up), ("down", down))}


def same_batch(module, step):
    return loss_of(module, *batch(0, step))


def parallel(module, mesh, **styles):
    return parallelize_module(module, mesh, plan(module, **styles))


def train_in_every_way():
    found = {}
    for way, options in OPTIONS.items():
        module = parallel(model(**options), mesh_of_all())
        assert [*module.state_dict()] == [*model(**options).state_dict()]
        assert "path=aten" in repr(module[0].up) and repr(module[0].up).startswith(
            "ColumnParallelLayer(in_features=8, "
        )
        found[way] = trained(module, same_batch)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_trained_as_in_one_process(ranks) -> None:
    """The loss, gradients and ten steps, up and down projections together; each rank has the same batch."""
    found = run_in(ranks, train_in_every_way)
    for way, options in OPTIONS.items():
        expected = trained_alone(model(**options), 1)
        for result in found:
            for kind in ("losses", "gradients", "parameters"):
                torch.testing.assert_close(result[way][kind], expected[kind])
        assert expected["losses"][-1] < 0.9 * expected["losses"][0]


def data_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = parallel(model(frozen_routing=True), mesh["tp"])
    for block in module:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    rank = mesh["dp"].get_local_rank()
    return rank, trained(module, lambda module, step: loss_of(module, *batch(rank, step)))


def test_under_fsdp_with_sequences_of_different_lengths() -> None:
    expected = trained_alone(model(frozen_routing=True), 2)
    found = run_in(4, data_and_tensor_parallel)
    for _, result in found:
        torch.testing.assert_close(result["gradients"], expected["gradients"])
        torch.testing.assert_close(result["parameters"], expected["parameters"])
    assert sorted(rank for rank, _ in found) == [0, 0, 1, 1]


def layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = RoutedLoRALinear(D, H, 3, dtype=dtype, **{"scaling": 0.7, **options})
    return randomize(made)


def whole_call(made, **options):
    """y and every gradient of a call, gate included; of a sharded layer all of them as whole tensors."""
    generator = torch.Generator().manual_seed(1)
    x, gate, dy = (torch.randn(4, 4, n, generator=generator, dtype=torch.float64) for n in (D, 3, H))
    x, gate = x.requires_grad_(), gate.requires_grad_()
    inputs = options.pop("cut", lambda t: t)
    y = made(inputs(x), gate=gate, **options)
    wanted = dict(made.named_parameters())
    gradients = torch.autograd.grad(y, [x, gate, *wanted.values()], options.pop("dy", dy).expand_as(y))
    return {"y": whole(y)} | {n: whole(g) for n, g in zip(["x", "gate", *wanted], gradients, strict=True)}


CALLS = {"single": {}, "bank": {"routing": 3, "frozen_routing": True}, "as Conv1D": {"conv": True}}


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
                torch.testing.assert_close(value, expected)


def along_the_sequence():
    """What lies around the two layers is cut along the sequence, as norms are."""
    mesh, module = mesh_of_all(), model(frozen=False)
    parallel(
        module,
        mesh,
        up=functools.partial(ColumnParallel, input_layouts=Shard(1)),
        down=functools.partial(RowParallel, output_layouts=Shard(1)),
    )
    x, wanted = (t.repeat(1, 4, 1).chunk(mesh.size(), 1)[mesh.get_local_rank()] for t in batch(0, 0))
    loss = loss_of(module, x, wanted) / mesh.size()
    loss.backward()
    return loss.detach(), {name: whole(p.grad) for name, p in module.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_x_and_y_in_parts_along_the_sequence(ranks) -> None:
    module = model(frozen=False)
    loss = loss_of(module, *(t.repeat(1, 4, 1) for t in batch(0, 0)))
    loss.backward()
    found = run_in(ranks, along_the_sequence)
    torch.testing.assert_close(sum(part for part, _ in found), loss.detach())
    for _, gradients in found:
        torch.testing.assert_close(gradients, {name: p.grad for name, p in module.named_parameters()})


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
