"""CL-LoRA as it is tested: a view a task, the shared blocks computed once; files of a run; transformers' ViT."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cl_lora_by_hand import ByHand
from torch import Tensor, nn
from vits import TARGETS, Learner, TinyViT, batch, cl_lora

from clora_kernels.continual import CLLoRA, CosineHead, Prototypes, load_run, save_run


def naive(method: CLLoRA, x) -> list:
    """What the protocol says: one whole run a view."""
    found = []
    for view in method.views():
        with torch.no_grad(), method.inference(view):
            found.append(method.run(x))
    return found


def test_a_view_is_the_latest_shared_with_what_is_the_tasks_own() -> None:
    """Held against the equations, for adapters put aside when each task ended."""
    base = TinyViT().double()
    method = cl_lora(copy.deepcopy(base))
    learner, own = Learner(method), []
    for _ in range(3):
        learner.learn(1)
        own.append({n: [t.clone() for t in m.adapter_state_dict().values()] for n, m in method.specific.items()})
    hand, x = ByHand(dict(base.state_dict()), {}, "", 2.0), batch(9, 9, torch.float64)[0]
    shared = {n: m.lora_B.detach() @ m.lora_A.detach() for n, m in method.shared.items()}
    got = method.outputs(x)
    assert len(got) == 3 and not torch.isclose(got[0], got[1]).any(1).all()
    for features, specific in zip(got, own, strict=True):
        deltas = shared | {n: mu * (B @ A) for n, (A, B, mu) in specific.items()}
        by_place = {(int(n.split(".")[1]), n.split(".")[2]): d for n, d in deltas.items()}
        torch.testing.assert_close(features, hand.features(x, 4, by_place).detach())


def shared_products(method: CLLoRA) -> Tensor:
    return torch.cat(
        [(m.lora_B.detach().double() @ m.lora_A.detach().double()).flatten() for m in method.shared.values()]
    )


def test_the_report_measures_what_moved_and_what_overlaps() -> None:
    method = cl_lora()
    learner = Learner(method)
    assert learner.learn(1)[0].measures == {"drift": None, "overlap": None}
    learner.begin()
    old, earlier = shared_products(method), method.kept["task.1.block_weights"].double()
    learner.train(range(3))
    new, weights = shared_products(method), method.block_weights().detach().double()
    measures = method.end_task().measures
    torch.testing.assert_close(torch.tensor(measures["drift"]), ((new - old).norm() / old.norm()).float())
    torch.testing.assert_close(
        torch.tensor(measures["overlap"]), F.cosine_similarity(weights, earlier, 0).abs().float()
    )


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("in_task", [False, True])
def test_outputs_are_those_of_one_run_a_view_with_the_shared_blocks_computed_once(wrapped: bool, in_task: bool) -> None:
    method = cl_lora(TinyViT(5, wrapped))
    learner = Learner(method)
    learner.learn(2)
    if in_task:
        learner.begin()
        learner.train(range(2))
    tasks = 3 if in_task else 2
    assert method.views() == list(range(1, tasks + 1))
    x, counts = batch(9, 9)[0], [0] * 5
    method.model.blocks[0].eval()
    modes = [m.training for m in method.model.modules()]
    expected, given = naive(method, x), x.clone()

    def counter(i: int):
        return lambda *_: counts.__setitem__(i, counts[i] + 1)

    handles = [block.up.register_forward_hook(counter(i)) for i, block in enumerate(method.model.blocks)]
    before = {k: t.clone() for k, t in method.model.state_dict().items()}
    got = method.outputs(x)
    assert counts == [1, 1, tasks, tasks, tasks]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(x, given) and not any(torch.equal(a, b) for a, b in itertools.pairwise(got))
    assert modes == [m.training for m in method.model.modules()]
    assert all(torch.equal(t, before[k]) for k, t in method.model.state_dict().items())
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(method.outputs((x,)), naive(method, {"x": x}), strict=True))
    # And the model computes again afterwards.
    assert not torch.isclose(method.outputs(x + 1)[0], got[0]).all()


def test_a_failing_view_leaves_the_model_as_it_was() -> None:
    method = cl_lora()
    Learner(method).learn(2)
    x, state = batch(9, 9)[0], {k: t.clone() for k, t in method.model.state_dict().items()}
    live = method.model(x)
    runs = iter([None, RuntimeError("out of memory")])

    def fail(*_: object) -> None:
        if error := next(runs):
            raise error

    with method.model.blocks[3].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        method.outputs(x)
    assert all("forward" not in vars(block) for block in method.model.blocks) and method.model.training
    assert not any(layer.merged for layer in method.layers.values())
    assert torch.equal(method.model(x), live)
    assert all(torch.equal(t, state[k]) for k, t in method.model.state_dict().items())


def test_views_are_the_tasks_begun() -> None:
    method = cl_lora()
    assert method.views() == [] and method.outputs(batch(1, 1)[0]) == []
    with pytest.raises(ValueError, match=r"view: got None, expected one of \[\]"), method.inference():
        raise AssertionError("there is no task yet")
    Learner(method).learn(2)
    for bad in (0, 3):
        with pytest.raises(ValueError, match=rf"view: got {bad}, expected one of \[1, 2\]"):
            method.inference_model(bad)
    x = batch(9, 9)[0]
    outputs = method.outputs(x)
    for view, expected in ((1, outputs[0]), (2, outputs[1]), (None, outputs[1])):
        plain = method.inference_model(view)
        assert {type(m) for m in plain.modules()} >= {TinyViT, nn.Linear} and not plain.training
        assert not any("lora" in name for name, _ in plain.named_parameters())
        assert torch.equal(plain(x), expected)


def test_prototypes_take_a_view_a_task() -> None:
    method, prototypes = cl_lora(), Prototypes()
    learner, x = Learner(method), torch.cat([batch(0, i)[0] for i in range(5)])
    for task in range(2):
        learner.learn(1)
        prototypes.add_task(method.outputs(x)[-1], torch.arange(len(x)) % 2 + 2 * task)
    predicted = prototypes.predict(method.outputs(x))
    assert predicted.shape == (30,) and set(predicted.tolist()) <= {0, 1, 2, 3}
    assert set(prototypes.predict(method.outputs(x), task=2).tolist()) <= {2, 3}


def first_token(model: nn.Module, hidden: Tensor) -> Tensor:
    """An exit of a user's own, without the norm."""
    return hidden[:, 0]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"idle_weights": 0},
        {},
        {"temperature": 0.5},
        {"exit": first_token},
        {"distillation": 0.0},
        {"weight_penalty": 0.0},
        {"reassignment": False},
    ],
    ids=lambda options: next(iter(options), "defaults"),
)
def test_a_run_goes_on_bit_for_bit(ended: bool, options: dict, tmp_path) -> None:
    """From the middle of the second task, or from its end; with dropout in the model."""
    base = TinyViT(dropout=0.2)

    def finish(learner: Learner) -> dict[str, Tensor]:
        if not ended:
            learner.train(range(2, 5))
            learner.method.end_task()
        learner.begin()
        learner.train(range(3))
        return {**learner.method.state_dict(), **learner.head.state_dict()}

    first = Learner(cl_lora(copy.deepcopy(base), **options))
    first.learn(1)
    first.begin()
    first.train(range(5 if ended else 2))
    objects = {}
    if ended:
        first.method.end_task()
    else:
        objects = first.objects()
    path = save_run(tmp_path / "run.safetensors", first.method, **objects)
    views = first.method.outputs(batch(9, 9)[0])
    expected = finish(first)

    second = Learner(cl_lora(copy.deepcopy(base), **options))
    run = load_run(path, second.method)
    if not ended:
        second.prepare()
        second.make_optimizer()
        second.method.head = second.head
        objects = second.objects()
    run.restore(**objects)
    assert (second.method.task, second.method.in_task) == (2, not ended)
    resumed = second.method.outputs(batch(9, 9)[0])
    assert len(views) == 2 and all(torch.equal(a, b) for a, b in zip(resumed, views, strict=True))
    got = finish(second)
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)


def test_a_file_of_other_options_is_refused(tmp_path) -> None:
    method = cl_lora()
    Learner(method).learn(1)
    path = save_run(tmp_path / "run.safetensors", method)
    for options in ({"idle_weights": 0}, {"distillation": 1.0}, {"reassignment": False}):
        with pytest.raises(ValueError, match=rf"of a method with \{{'{next(iter(options))}': "):
            load_run(path, cl_lora(**options))
    with pytest.raises(ValueError, match=r"of a method with \{'r': 2\}, expected \{'r': 3\}"):
        load_run(path, CLLoRA(TinyViT(), TARGETS, r=3))
    state = method.state_dict()
    with pytest.raises(ValueError, match=r"unexpected \['own\.idle_weights'\]"):
        cl_lora(idle_weights=0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"own\.idle_weights: got shape \(2, 1\), expected \(2, 2\)"):
        cl_lora(idle_weights=2).load_state_dict(state)
    with pytest.raises(ValueError, match="shape"):
        CLLoRA(TinyViT(), TARGETS, r=3).load_state_dict(state)
    del state["kept.task.1.block_weights"]
    with pytest.raises(ValueError, match=r"state: missing \['kept\.task\.1\.block_weights'\]"):
        cl_lora().load_state_dict(state)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(7)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=5, num_attention_heads=2,
        intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def learn_on(model: nn.Module) -> CLLoRA:
    torch.manual_seed(8)
    method = CLLoRA(model.train(), r=2)
    for _ in range(2):
        head = CosineHead(16, 3)
        method.begin_task(head)
        optimizer = torch.optim.SGD([*method.param_groups(0.3), {"params": head.parameters()}], lr=0.3, momentum=0.9)
        for _ in range(3):
            x, labels = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
            losses = method.training_step(
                x, lambda h=head, x=x, y=labels: F.cross_entropy(h(model(x).last_hidden_state[:, 0]), y), optimizer
            )
        method.end_task()
    assert set(losses) == {"distillation", "task", "block_weights"}
    return method


def test_transformers_vit(vit: nn.Module) -> None:
    method = learn_on(copy.deepcopy(vit))
    assert list(method.shared) == [f"layers.{i}.attention.{p}_proj" for i in range(2) for p in "qv"]
    assert list(method.specific) == [f"layers.{i}.attention.{p}_proj" for i in range(2, 5) for p in "qv"]
    x = {"pixel_values": torch.randn(4, 1, 8, 8), "output_hidden_states": True}
    for got, expected in zip(method.outputs(x), naive(method, x), strict=True):
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        assert len(got.hidden_states) == 6
        assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))


def test_recomputed_activations_change_nothing(vit: nn.Module) -> None:
    """The early exit leaves a block in the middle of a checkpoint."""
    plain, recomputing = learn_on(copy.deepcopy(vit)), copy.deepcopy(vit)
    # Its name since some version 5, and before.
    enable = getattr(recomputing, "activation_checkpointing_enable", None) or recomputing.gradient_checkpointing_enable
    enable()
    assert sum(getattr(m, "gradient_checkpointing", False) for m in recomputing.modules()) >= 5
    state = learn_on(recomputing).state_dict()
    assert all(torch.equal(t, state[k]) for k, t in plain.state_dict().items())
