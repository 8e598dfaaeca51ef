"""Where nothing is compiled: a call that the compiled part would have taken warns, once, and says the same in other
words; no other call does."""

from __future__ import annotations

import warnings

import pytest
import torch

from clora_kernels import (
    RoutedLoRA,
    RoutedLoRALinear,
    explain,
    extension,
    gram_schmidt,
    gram_schmidt_foreach,
    orthonormal_basis,
    rank1_experts,
    routed_lora_linear,
    routed_lora_linear_group,
)

X, W, A, B = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
X16, W16 = X.bfloat16(), W.bfloat16()
V = torch.randn(9, 4)
LAYER = RoutedLoRALinear(8, 6, 4, routing=False, dtype=torch.bfloat16)
MISSED = {
    "linear": ("routed_lora", routed_lora_linear, (X16, W16, A, B)),
    "layer": ("routed_lora", LAYER, (X16,)),
    "matrix": ("gram_schmidt", gram_schmidt, (V,)),
    "list": ("gram_schmidt", gram_schmidt_foreach, ([V, V[:5]],)),
    "basis": ("gram_schmidt", orthonormal_basis, (V,)),
    "experts": ("rank1_experts", rank1_experts, (X, A, torch.randn(4, 6), torch.tensor([[0, 3], [1, 1]]))),
}


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        run()
    return [w for w in caught if w.category is RuntimeWarning]


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(extension, "_kernels", frozenset())
    monkeypatch.setattr(extension, "_warned", set())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "torch.compile"])
@pytest.mark.parametrize("name", MISSED)
def test_it_warns_once_at_the_line_of_the_user(name, compiled, nothing_compiled):
    operation, fn, args = MISSED[name]
    run = torch.compile(fn, fullgraph=True, backend="aot_eager") if compiled else fn
    told = warned(lambda: [run(*args) for _ in range(3)])
    assert len(told) == 1 and told[0].filename == __file__
    message = str(told[0].message)
    assert message.startswith(f"clora_kernels has no compiled {operation} for cpu and runs it slower on ATen")
    assert "pip install --no-build-isolation ." in message and "info()" in message


def test_each_operation_warns_and_a_caller_can_make_it_an_error(nothing_compiled):
    told = warned(lambda: [fn(*args) for _, fn, args in MISSED.values()])
    assert [str(w.message).split()[4] for w in told] == ["routed_lora", "gram_schmidt", "rank1_experts"]
    extension._warned.clear()
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning, match="no compiled gram_schmidt"):
        warnings.simplefilter("error")
        gram_schmidt(V)


@pytest.mark.parametrize("name", MISSED)
def test_explain_says_what_is_missing_and_does_not_warn(name, nothing_compiled):
    _, fn, args = MISSED[name]
    choices = []
    assert not warned(lambda: choices.append(explain(fn, *args)))
    assert choices[0].backend == "aten" and choices[0].reason == extension.CPU_MISSING
    if fn is not LAYER:
        with pytest.raises(ValueError, match=r"backend='native' cannot run .*the compiled part cpu is not there"):
            explain(fn, *args, backend="native")
        assert explain(fn, *args, backend="aten").reason == "named by the caller"


def test_what_the_compiled_part_would_not_have_taken_does_not_warn(nothing_compiled):
    many = torch.zeros(1, 1).expand(1 << 19, 8)
    adapter = RoutedLoRA(W, A, B)
    calls = [
        (routed_lora_linear, (X16, W16, A, B), {"backend": "aten"}),
        (routed_lora_linear, (X16, W16, A, B), {"backend": "reference"}),
        (routed_lora_linear, (X16, W16, A, B, torch.eye(4)), {}),
        (routed_lora_linear, (X, W, A, B), {}),
        (routed_lora_linear, (X.double(), W.double(), A, B), {}),
        (routed_lora_linear, (many, W, A, B), {}),
        (routed_lora_linear_group, (X, [adapter, adapter]), {}),
        (routed_lora_linear_group, (X16, [adapter._replace(weight=W16)] * 2), {}),
        (gram_schmidt, (V,), {"backend": "aten"}),
        (gram_schmidt, (V,), {"backend": "reference"}),
        (gram_schmidt, (V.double(),), {}),
    ]
    for fn, args, kwargs in calls:
        assert not warned(lambda fn=fn, args=args, kwargs=kwargs: fn(*args, **kwargs))
        assert extension.CPU_MISSING not in explain(fn, *args, **kwargs).reason


@pytest.mark.skipif(not extension.has_op("gram_schmidt_sweeps", "cpu"), reason="nothing is compiled here")
@pytest.mark.parametrize("name", MISSED)
def test_where_it_is_there_nothing_is_told(name, monkeypatch):
    _, fn, args = MISSED[name]
    monkeypatch.setattr(extension, "_warned", set())
    assert not warned(lambda: fn(*args)) and explain(fn, *args).backend == "native"
