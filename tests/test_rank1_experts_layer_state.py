"""Rank1ExpertLinear beside what nn.Module does, saved and loaded, and in whole models."""

import copy
import io
import pickle

import pytest
import torch
from layers import expert_layer, randomize, same_bits, snapshot
from torch import nn
from torch.nn.utils import parametrize

import clora_kernels as ck
from clora_kernels import ProductKeyScores, Rank1ExpertLinear, RoutedLoRALinear

OWN = ["experts_A", "experts_B", "activation_counts", "scoring.weight", "scoring.bias"]


def used(**options):
    """A layer whose counts are not zero."""
    layer = expert_layer(**options)
    if isinstance(layer.scoring, ProductKeyScores):
        layer.scoring.norm.reset_running_stats()  # a random variance may be negative
    layer(torch.randn(4, 7, 37))
    return layer


def keys():
    torch.manual_seed(1)
    return ProductKeyScores(37, 25, 5, key_features=3, batch_norm=True)


def scaled():
    return nn.Parameter(torch.tensor(0.5))


def test_adapter_parameters_and_state_are_pool_router_counts_and_scaling():
    layer = used(scaling=scaled())
    state = layer.adapter_state_dict()
    assert sorted(state) == sorted([*OWN, "scaling"]) and not any(t.requires_grad for t in state.values())
    assert {id(p) for p in layer.adapter_parameters()} == {
        id(p) for name, p in layer.named_parameters() if name not in ("weight", "bias")
    }
    assert len(list(layer.adapter_parameters())) == 5
    state["scoring.weight"].fill_(3)
    assert (layer.scoring.weight == 3).all(), "it shares memory"
    assert sorted(layer.state_dict()) == sorted([*state, "weight", "bias"])
    with_function = expert_layer(scoring=lambda x: torch.randn(4, 23))
    assert list(with_function.adapter_state_dict()) == OWN[:3]


@pytest.mark.parametrize("options", [{}, {"experts": 25, "scoring": keys, "selection": "token"}])
def test_state_dict_round_trip_pickle_and_deepcopy(options):
    def build():
        return used(**{k: v() if k == "scoring" else v for k, v in options.items()})

    layer, x = build(), torch.randn(4, 7, 37)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = build()
    other.reset_adapter()
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    other.load_state_dict(torch.load(file))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_bits(twin.state_dict(), layer.state_dict()) and twin.activation_counts.any()
        assert torch.equal(twin.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_strictly_and_keeps_pool_and_router(assign):
    layer, linear = used(), nn.Linear(37, 29)
    adapter = {k: v.clone() for k, v in layer.adapter_state_dict().items()}
    parameters = list(layer.adapter_parameters())
    model, plain = nn.Sequential(nn.Identity(), layer), nn.Sequential(nn.Identity(), linear).state_dict()
    before = dict(plain)
    model.load_state_dict(plain, assign=assign)
    assert torch.equal(layer.weight, linear.weight) and same_bits(layer.adapter_state_dict(), adapter)
    assert all(a is b for a, b in zip(layer.adapter_parameters(), parameters, strict=True)) and plain == before
    layer.load_state_dict(linear.state_dict())
    for missing in OWN:
        partial = {**linear.state_dict(), **{k: v for k, v in adapter.items() if k != missing}}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
            layer.load_state_dict(partial)
    with pytest.raises(RuntimeError, match="experts_C"):
        layer.load_state_dict({**layer.state_dict(), "experts_C": torch.ones(1)})


def test_a_merged_layer_loads_nothing():
    layer = used().eval()
    layer.merge()
    state = {k: torch.zeros_like(v) for k, v in layer.state_dict().items()}
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        layer.load_adapter_state_dict(layer.adapter_state_dict())
    assert same_bits(snapshot(layer), before)
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        layer.train()(torch.randn(4, 37))


def test_an_adapter_loads_strictly_or_not_at_all():
    layer = used()
    before = {k: v.clone() for k, v in layer.adapter_state_dict().items()}
    good = {k: torch.full_like(v, 2) for k, v in before.items()}
    for bad, message in (
        ({k: v for k, v in good.items() if k != "scoring.bias"}, r"missing \['scoring.bias'\]"),
        ({**good, "lora_A": good["experts_A"]}, r"unexpected \['lora_A'\]"),
        (
            {**good, "experts_A": torch.ones(2, 2)},
            r"state_dict\['experts_A'\]: got shape \(2, 2\), expected \(23, 37\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            layer.load_adapter_state_dict(bad)
        assert same_bits(layer.adapter_state_dict(), before)
    layer.load_adapter_state_dict(good)
    assert same_bits(layer.adapter_state_dict(), good)


@pytest.mark.parametrize("selection", ["token", "batch"])
def test_a_layer_made_on_meta_starts_by_reset_parameters(selection):
    torch.manual_seed(0)
    there = Rank1ExpertLinear(12, 10, 7, 3, selection=selection)
    late = Rank1ExpertLinear(12, 10, 7, 3, selection=selection, device="meta")
    assert "scaling=?" in repr(late) and late.scoring.weight.is_meta and late.activation_counts.is_meta
    with pytest.raises(RuntimeError, match=r"scoring\.weight"):
        late.load_state_dict(nn.Linear(12, 10).state_dict(), assign=True)
    late = Rank1ExpertLinear(12, 10, 7, 3, selection=selection, device="meta").to_empty(device="cpu")
    for t in late.state_dict().values():
        t.fill_(7)
    torch.manual_seed(0)
    late.reset_parameters()
    assert same_bits(late.state_dict(), there.state_dict())


def test_a_scoring_that_was_given_keeps_its_values():
    scoring = nn.Linear(37, 23)
    before = snapshot(scoring)
    layer = expert_layer(scoring=lambda x: scoring(x))
    owner = Rank1ExpertLinear(37, 29, 23, 5, scoring=scoring)
    for act in (owner.reset_parameters, owner.fold, layer.fold):
        act()
        assert same_bits(snapshot(scoring), before) and owner.scoring is scoring


def test_dtypes_of_pool_and_router_and_moves():
    layer = Rank1ExpertLinear(12, 10, 7, 3, dtype=torch.bfloat16, adapter_dtype=torch.float16)
    assert {t.dtype for name, t in layer.named_parameters() if name not in ("weight", "bias")} == {torch.float16}
    assert Rank1ExpertLinear(12, 10, 7, 3, dtype=torch.bfloat16).scoring.weight.dtype == torch.float32
    layer.double()
    assert {t.dtype for t in layer.parameters()} == {torch.float64} and layer.activation_counts.dtype == torch.int64
    x = torch.randn(4, 12, dtype=torch.float64)
    layer.eval().merge(top=2)
    y = layer(x)
    assert layer.float()._unmerged.dtype == torch.float32 and y.dtype == torch.float64
    layer.unmerge()
    assert layer(x.float()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8"):
        Rank1ExpertLinear(12, 10, 7, 3, dtype=torch.int8)


def test_what_was_merged_can_be_folded_after_a_copy():
    layer = used().eval()
    layer.merge(indices=torch.tensor([4, 2]), gates=torch.tensor([2.0, 3.0]))
    merged, twin = layer.weight.detach().clone(), pickle.loads(pickle.dumps(layer))
    twin.fold()
    assert torch.equal(twin.weight, merged) and not twin.merged and layer.merged


@pytest.mark.parametrize("act", ["merge", "fold"])
def test_a_parametrized_weight_is_not_merged(act):
    layer, x = used().eval(), torch.randn(2, 37)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    y = layer(x)
    with pytest.raises(ValueError, match="weight: got a parametrized one"):
        getattr(layer, act)()
    assert torch.equal(layer(x), y)


def test_inference_mode_counts_and_merges():
    layer = expert_layer()
    with torch.inference_mode():
        layer(torch.randn(4, 7, 37))
        layer.eval().merge()
    assert layer.activation_counts.sum() == 20
    x = torch.randn(2, 37, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 36), ValueError, r"x: got shape \(2, 36\), expected \[\.\.\., 37\]"),
        (torch.randn(2, 0, 37), ValueError, r"x: got shape \(2, 0, 37\), expected a token by which a sample chooses"),
        (torch.randn(2, 37).double(), TypeError, r"x: got dtype torch\.float64, expected torch\.float32"),
        (torch.randn(2, 37, device="meta"), ValueError, "x: got device meta, expected cpu"),
        (torch.tensor(1.0), ValueError, "x: got a 0-dim tensor"),
        ([1.0], TypeError, "x: got list"),
    ],
)
def test_an_x_that_does_not_fit_is_told_by_call_and_explain(x, error, message):
    layer = expert_layer()
    for call in (layer, lambda x: ck.explain(layer, x)):
        with pytest.raises(error, match=message):
            call(x)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ck.explain(layer, x, gate=None)
    layer.merge()
    with pytest.raises(RuntimeError, match="layer is merged"):
        ck.explain(layer, torch.randn(2, 37))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.up(torch.tanh(self.q(x)))


def pool(linear):
    return randomize(Rank1ExpertLinear.from_linear(linear, 6, 2, selection="token"))


def test_whole_models_inject_freeze_merge_and_extract():
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(3, 4, 8)
    before = snapshot(model)
    report = ck.inject(model, pool, ["up"])
    assert report.swapped == ["0.up", "1.up"] and report.left == []
    report = ck.inject(model, pool, r".*")
    assert report.swapped == ["0.q", "1.q"], "a router is no layer of the model"
    assert [name for name, why in report.left] == ["0.up", "1.up"] and "adapted already" in str(report)
    with pytest.raises(ValueError, match=r"swaps nothing in Sequential \(none\)"):
        ck.inject(model, pool, ["scoring"])
    trainable = ck.freeze_base(model)
    names = [name for name in OWN if name != "activation_counts"]
    assert sorted(trainable) == sorted(f"{i}.{q}.{name}" for i in "01" for q in ("q", "up") for name in names)
    model(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable)
    model.eval()
    y = model(x)
    assert ck.merge_all(model, backup="cpu") == ["0.q", "0.up", "1.q", "1.up"] and not torch.equal(model(x), y)
    ck.unmerge_all(model)
    assert torch.equal(model(x), y)
    ck.merge_all(model)
    adapters = ck.extract(model)
    assert adapters.keys() == {"0.q", "0.up", "1.q", "1.up"} and adapters["0.q"].keys() == set(OWN)
    assert same_bits(snapshot(model), before)
    ck.inject(model, pool, ["q", "up"])
    for name, state in adapters.items():
        model.get_submodule(name).load_adapter_state_dict(state)
    assert torch.equal(model.eval()(x), y)


def test_a_model_that_is_itself_a_layer_has_nothing_to_swap():
    layer = expert_layer()
    with pytest.raises(ValueError, match="swaps nothing in Rank1ExpertLinear"):
        ck.inject(layer, pool, ["scoring"])
    assert type(layer.scoring) is nn.Linear


@pytest.mark.parametrize("beside", [False, True])
def test_no_lora_equals_a_pool(beside):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ck.inject(model, pool, ["1"])
    if beside:
        ck.inject(model, lambda linear: randomize(RoutedLoRALinear.from_linear(linear, 2)), ["0"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="model: got a Rank1ExpertLinear at '1', which no LoRA equals"):
        ck.to_lora(model)
    assert same_bits(snapshot(model), before)
