"""The example of an orthogonal start: what it says of overlaps, that the model stays as it was, that it learns."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch

import clora_kernels as ck
from clora_kernels.testing import assert_orthonormal

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def examples():
    """The example's modules, with short trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import digits
        import orthogonal_init

        patch.setitem(digits.PRETRAINING_EPOCHS, "classes", 1)
        patch.setattr(orthogonal_init, "EPOCHS", 3)
        yield orthogonal_init, digits


@pytest.fixture(scope="module")
def stream(examples):
    made = examples[1].make_stream(0)
    return dataclasses.replace(made, train=[examples[1].Samples(*(t[::4] for t in task)) for task in made.train])


def test_the_start_is_orthogonal_and_the_new_task_is_learned(examples, stream) -> None:
    example, _ = examples
    result = example.run(stream, rank=4)
    assert len(result.before) == 4 * 4 + 1 and list(result.before) == list(result.after) == list(result.learned)
    assert 0.03 < min(result.before.values()) and max(result.after.values()) < 1e-6
    total = result.before["in total"]
    assert min(result.before.values()) < total < max(result.before.values())
    assert result.learned["in total"] > result.after["in total"], "training moved lora_A"
    for losses in (result.kaiming_losses, result.orthogonal_losses):
        assert len(losses) == 3 and losses[-1] < 0.95 * losses[0]


def test_rows_keep_their_length_and_dependent_ones_are_drawn_anew(examples, stream) -> None:
    example, _ = examples
    model, layers = example.adapt(stream.backbone, 5)
    images = stream.test[0].images[:7]
    before = model(images)
    old = {name: torch.randn(6, layer.in_features) for name, layer in layers.items()}
    for name, layer in layers.items():
        old[name][3] = old[name][1]  # a basis of five columns
        with torch.no_grad():
            layer.lora_A[2] = 0.5 * old[name][0]  # nothing of its own
    lengths = {name: layer.lora_A.norm(dim=1) for name, layer in layers.items()}
    example.start_orthogonally(layers, old)
    assert torch.equal(model(images), before), "lora_B is zero"
    for name, layer in layers.items():
        A = layer.lora_A.detach().double()
        torch.testing.assert_close(A @ A.mT, torch.diag(lengths[name].double().square()), rtol=1e-5, atol=1e-6)
        assert (old[name].double() @ A.mT).abs().max() < 1e-5


def test_overlap_is_one_of_the_same_and_zero_of_the_orthogonal(examples, stream) -> None:
    example, _ = examples
    _, layers = example.adapt(stream.backbone, 1)
    same = {name: -3 * layer.lora_A.detach() for name, layer in layers.items()}
    assert list(example.overlaps(layers, same).values()) == pytest.approx([1.0] * 17)
    turned = {name: A.flip(1) * torch.tensor([1.0, -1.0]).repeat(A.shape[1] // 2) for name, A in same.items()}
    assert max(example.overlaps(layers, turned).values()) < 1e-6


def test_folding_ends_a_task(examples, stream) -> None:
    example, _ = examples
    model, layers = example.adapt(stream.backbone, 3)
    example.learn(model, stream.train[0])
    learned, before = (
        {n: layer.lora_A.detach().clone() for n, layer in layers.items()},
        model(stream.test[0].images[:5]),
    )
    old = example.fold(layers)
    torch.testing.assert_close(model(stream.test[0].images[:5]), before, rtol=1e-4, atol=1e-5)
    for name, layer in layers.items():
        assert torch.equal(old[name], learned[name]) and not layer.lora_B.any()
        assert not torch.equal(layer.lora_A, old[name])


def test_the_command_prints_every_layer(examples, stream, monkeypatch, capsys) -> None:
    example, _ = examples
    monkeypatch.setattr(example, "make_stream", lambda seed: dataclasses.replace(stream, seed=seed))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    example.main(["--rank", "2", "--seed", "3"])
    out = capsys.readouterr().out
    assert out.count("vit.layers.") == 16 and "in total" in out
    assert out.count("loss of the new task by epoch, ") == 2


@pytest.mark.parametrize("rank", ["0", "22"])
def test_ranks_that_do_not_fit_are_refused(examples, rank, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        examples[0].main(["--rank", rank])
    assert stop.value.code == 2 and f"--rank: got {rank}, expected 1 to 21" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_snippet_of_the_readme_does_what_it_says(examples, dtype) -> None:
    """And to the bit what the example does, where that keeps lora_A in fp32."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(# layers: .*?)```", readme, re.DOTALL)
    layers = {name: ck.RoutedLoRALinear(40, n, 4, adapter_dtype=dtype) for name, n in (("q", 24), ("up", 80))}
    earlier = {name: [torch.randn(4, 40, dtype=dtype, requires_grad=True) for _ in range(3)] for name in layers}
    before, same = ([layer.lora_A.detach().clone().float().mT for layer in layers.values()], copy.deepcopy(layers))
    made = {"ck": ck, "torch": torch, "layers": layers, "earlier": earlier}
    exec(snippet, made)
    for result, V, old in zip(made["new"], before, made["old"], strict=True):
        assert_orthonormal(result, V, old, ranks=[4])
    examples[0].start_orthogonally(same, {name: torch.cat(tensors).float() for name, tensors in earlier.items()})
    for name, layer in layers.items():
        assert layer.lora_A.is_leaf and layer.lora_A.requires_grad
        assert dtype != torch.float32 or torch.equal(layer.lora_A, same[name].lora_A)
