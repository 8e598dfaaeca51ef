"""The protocol: attaching, the order of the hooks, a method of one's own, inference, and going on bit for bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, KeptApart
from sequences import TARGETS, Net, batch, learn, train
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod, SequentialLoRA, vit_targets


def test_a_method_in_one_file_gets_its_hooks_in_order() -> None:
    method = KeptApart(Net(), TARGETS)
    method.begin_task()
    optimizer = torch.optim.SGD(method.param_groups(0.1))
    losses = train(method, optimizer, 1, range(2))
    steps = ["steps on (8, 6)", "adjust pull", "losses", "adjust task"]
    assert method.calls == ["start", "check", *steps, *steps]
    # The extra step was a step of its own, on gradients as the hook left them.
    assert not method.moved[0].any() and method.moved[1:].all()
    assert [set(x) for x in losses] == [{"pull", "task"}] * 2
    assert not any(v.requires_grad for x in losses for v in x.values())
    report = method.end_task()
    assert (report.measures, report.task, report.trainable) == ({"bases": 2.0}, 1, 2 * (6 + 9) + 2 * (9 + 5))
    method.begin_task()
    (losses,) = train(method, torch.optim.SGD(method.param_groups(0.1)), 2, range(1))
    assert losses["overlap"] > 0
    assert method.end_task().stored > report.stored


def test_extra_losses_reach_the_gradients() -> None:
    class Pulled(SequentialLoRA):
        def extra_losses(self) -> dict[str, Tensor]:
            return {"norm": 3.0 * self.layers["first"].lora_A.sum()}

    method = Pulled(Net(), TARGETS, r=4)
    method.begin_task()
    train(method, torch.optim.SGD(method.param_groups(0.0)), 1, range(1))
    # B = 0 as yet: the task itself gives A no gradient.
    assert (method.layers["first"].lora_A.grad == 3).all()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_loss_in_parts_is_their_sum(parts: int) -> None:
    """One part at a time: none runs before the one before it was differentiated."""
    base, (x, labels) = Net().double(), batch(1, 0)
    methods = [METHODS["c-lora"](copy.deepcopy(base)) for _ in range(2)]
    whole, split = methods
    split.load_state_dict({k: v.clone() for k, v in whole.state_dict().items()})
    seen: list[tuple[int, bool]] = []

    def loss_of(method: ContinualMethod, rows: slice) -> Tensor:
        seen.append((rows.start, method.layers["first"].routing.grad is not None))
        return F.cross_entropy(method.model(x.double()[rows]), labels[rows], reduction="sum")

    size = -(-len(x) // parts)
    pieces = [slice(start, start + size) for start in range(0, len(x), size)]
    for method, losses in ((whole, slice(0, len(x))), (split, pieces)):
        method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(0.1), momentum=0.9)
        for _ in range(2):
            seen.clear()
            functions = [partial(loss_of, method, rows) for rows in (losses if method is split else [losses])]
            told = method.training_step(x, functions if method is split else functions[0], optimizer)
        method.told = told
    assert seen == [(rows.start, i > 0) for i, rows in enumerate(pieces)]
    torch.testing.assert_close(split.told, whole.told)
    torch.testing.assert_close(split.state_dict(), whole.state_dict())
    with pytest.raises(ValueError, match=r"task_loss: got \[\], expected a function or several"):
        split.training_step(x, [], optimizer)


def test_attaching_swaps_the_targets_and_freezes_the_rest() -> None:
    model = Net()
    method = SequentialLoRA(model, TARGETS, r=4)
    assert list(method.layers) == TARGETS and type(model.out) is nn.Linear
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{t}.lora_{x}" for t in TARGETS for x in "AB"}
    with pytest.raises(ValueError, match="targets"):
        SequentialLoRA(Net(), ["third"])
    with pytest.raises(ValueError, match="train: got 'often'"):
        SequentialLoRA(Net(), TARGETS, train="often")
    with pytest.raises(NotImplementedError, match="ContinualMethod does not say"):
        ContinualMethod(Net(), TARGETS)

    class Plain(ContinualMethod):
        def make_layer(self, linear: nn.Module) -> nn.Module:
            return nn.Identity()

    with pytest.raises(TypeError, match="make_layer: got Identity for first"):
        Plain(Net(), TARGETS)


def test_a_layer_that_stands_in_two_places_is_one_layer() -> None:
    model = nn.Sequential(linear := nn.Linear(4, 4), nn.Tanh(), linear)
    method = SequentialLoRA(model, ["0", "2"], r=2)
    assert len(method.layers) == 1 and len(method.trainable()) == 2
    nn.init.normal_(method.layers["0"].lora_B)
    x = torch.randn(3, 4)
    plain = method.inference_model()
    assert plain[0] is plain[2] and type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), model(x))


def test_tasks_begin_and_end_in_turn() -> None:
    method = METHODS["lora"](Net())
    with pytest.raises(RuntimeError, match="end_task: no task"):
        method.end_task()
    with pytest.raises(RuntimeError, match="training_step: no task"):
        method.training_step(None, lambda: torch.zeros(()), torch.optim.SGD(method.param_groups(0.1)))
    method.begin_task()
    with pytest.raises(RuntimeError, match="task 1 is still being learned"):
        method.begin_task()
    method.end_task()
    assert (method.task, method.in_task) == (1, False)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_may_move_within_a_task(name: str, loaded: bool) -> None:
    """To another dtype, which stands for another device."""
    base = Net()
    method = METHODS[name](copy.deepcopy(base))
    learn(method, 1)
    method.begin_task()
    if loaded:
        state, method = method.state_dict(), METHODS[name](base)
        method.load_state_dict(state)
    method.model.double()
    for task in (2, 3):
        optimizer = torch.optim.SGD(method.param_groups(0.1))
        x, labels = batch(task, 0)
        method.model.out.requires_grad_()  # a method may train nothing in a later task
        losses = method.training_step(
            x.double(), lambda x=x, y=labels: F.cross_entropy(method.model(x.double()), y), optimizer
        )
        assert {loss.dtype for loss in losses.values()} == {torch.float64} and all(map(torch.isfinite, losses.values()))
        assert len(losses) == (1 if name == "slao" or name.startswith("lora") else 2)
        method.end_task()
        assert method.outputs(x.double())[0].dtype == torch.float64
        method.begin_task()


@pytest.mark.parametrize("name", ["lora", "dac"])
def test_a_model_in_eval_mode_is_not_trained(name: str) -> None:
    """DAC would count nothing and keep the first experts, whichever learned."""
    method = METHODS[name](Net())
    learn(method, 1)
    method.begin_task()
    method.outputs(batch(9, 9)[0])  # which leaves the mode as it was
    optimizer = torch.optim.SGD(method.param_groups(0.1))
    method.model.eval()
    before = {k: v.clone() for k, v in {**method.state_dict(), **method.model.state_dict()}.items()}
    x, labels = batch(2, 0)

    def step() -> dict[str, Tensor]:
        return method.training_step(x, lambda: F.cross_entropy(method.model(x), labels), optimizer)

    with pytest.raises(RuntimeError, match=r"model: got one in eval mode, .* expected model\.train\(\) first"):
        step()
    after = {**method.state_dict(), **method.model.state_dict()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    method.model.train()
    step()


def test_what_learns_in_which_task() -> None:
    for name, first, later in (
        ("lora", 4, 4),
        ("lora of the first task", 4, 0),
        ("c-lora", 6, 6),
        ("c-lora, first factors", 6, 2),
        ("dac", 4, 4),
        ("dac by sample", 8, 8),
    ):
        method = METHODS[name](Net())
        counts = []
        for _ in range(3):
            method.begin_task()
            assert {id(p) for p in method.trainable()} == {id(p) for p in method.model.parameters() if p.requires_grad}
            counts.append(len(method.trainable()))
            method.end_task()
        assert counts == [first, later, later], name
    assert SequentialLoRA(Net(), TARGETS, train="never").trainable() == []


@pytest.mark.parametrize("name", METHODS)
def test_memory_grows_by_what_is_folded_alone(name: str) -> None:
    """The frozen weights are not saved, so what went into them is: of DAC, A, B and the counts of every task. SLAO has
    two pairs, however many tasks."""
    reports = learn(METHODS[name](Net()), 1) if "lora of" in name else learn(METHODS[name](Net()), 4)
    pairs = 4 * (6 + 9) + 4 * (9 + 5)
    routers, counts = (4 * (6 + 1) + 4 * (9 + 1), 2 * 4) if "dac" in name else (0, 0)
    adapters = pairs * (2 if name == "slao" else 1) + (4 * 16 if "c-" in name else 0) + routers + counts
    folded = pairs + counts if "dac" in name else 0
    assert [r.stored for r in reports] == [adapters + r.task * folded for r in reports]


@pytest.mark.parametrize("name", ["lora", "c-lora", "dac"])
def test_inference_is_one_merged_weight_and_leaves_no_trace(name: str) -> None:
    method = METHODS[name](Net())
    learn(method, 2)
    model, (x, _) = method.model.train(), batch(9, 9)
    model.first.eval()
    live, before = model(x), copy.deepcopy(model.state_dict())
    with method.inference() as inside:
        assert inside is model and not any(m.training for m in model.modules())
        assert all(layer.merged for layer in method.layers.values())
        torch.testing.assert_close(model(x), live)
    assert model.training and not model.first.training and model.second.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(model(x), live)
    plain = method.inference_model()
    assert {type(m) for m in plain.modules()} == {Net, nn.Linear} and not plain.training
    torch.testing.assert_close(plain(x), live)
    assert torch.equal(model(x), live) and not any(layer.merged for layer in method.layers.values())


def test_inference_ends_when_it_fails() -> None:
    method = METHODS["lora"](Net())
    with pytest.raises(KeyError), method.inference():
        raise KeyError
    assert method.model.training and not any(layer.merged for layer in method.layers.values())


OLD_NAMES = [
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
]
OLD_NAMES += ["intermediate.dense", "output.dense"]
NEW_NAMES = [*(f"attention.{x}_proj" for x in "qkvo"), "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("names", [OLD_NAMES, NEW_NAMES], ids=["before version 5", "since version 5"])
def test_vit_targets_fit_both_sets_of_names(names: list[str]) -> None:
    def tree(names: list[str]) -> nn.Module:
        root = nn.Module()
        for name in names:
            module = root
            *path, leaf = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.add_module(leaf, nn.Linear(2, 2))
        return root

    parts = ["q", "k", "v", "out", "fc1", "fc2"]
    model = tree([f"encoder.layer.{i}.{name}" for i in range(2) for name in names] + ["pooler.dense"])
    for part, name in zip(parts, names, strict=True):
        method = SequentialLoRA(copy.deepcopy(model), vit_targets([part]), r=1)
        assert list(method.layers) == [f"encoder.layer.{i}.{name}" for i in range(2)]
    assert len(SequentialLoRA(model, vit_targets(), r=1).layers) == 8
    for bad in (["w"], []):
        with pytest.raises(ValueError, match=r"parts: got \["):
            vit_targets(bad)
