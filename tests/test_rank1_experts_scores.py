"""What chooses rank-1 experts: the k largest, the lowest index first, product keys, what scorings may return."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from clora_kernels import ProductKeyScores, Rank1ExpertLinear
from clora_kernels.modules.rank1_experts.choosing import activations, choose_experts, top_experts
from clora_kernels.reference import rank1_experts as reference
from clora_kernels.testing import assert_parity


def by_sort(scores, k):
    """What top_experts must give, said plainly."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_the_largest_and_of_equal_ones_the_lowest(dtype):
    for k in (1, 3, 11):
        scores = torch.randint(-3, 3, (5, 7, 11)).to(dtype)
        assert torch.equal(top_experts(scores, k), by_sort(scores, k))
        spread = torch.randn(5, 7, 11).mul(1e3).to(dtype)
        assert torch.equal(top_experts(spread, k), by_sort(spread, k))
    assert top_experts(torch.randn(0, 4), 2).shape == (0, 2)


def test_both_zeros_are_equal_and_infinities_the_ends():
    scores = torch.tensor([0.0, -0.0, float("-inf"), 1e-45, float("inf"), -0.0, 0.0, -1e-45, -3e38, 3e38])
    assert top_experts(scores, 10).tolist() == [4, 9, 3, 0, 1, 5, 6, 7, 8, 2]
    assert top_experts(scores.requires_grad_(), 3).requires_grad is False


def test_activations_count_every_position():
    indices = torch.tensor([[3, 3], [0, 3]], dtype=torch.int32)
    assert activations(indices, 5).tolist() == [1, 0, 0, 3, 0]


def made(**options):
    torch.manual_seed(0)
    return ProductKeyScores(13, **{"experts": 49, "k": 4, "heads": 3, "key_features": 5, **options})


def all_scores(keys, x):
    """[..., heads, E]: every sum of two halves."""
    first, second = keys.key_scores(x)
    return (first[..., :, None] + second[..., None, :]).flatten(-2)


def whole_numbers(keys, x):
    """x and parameters that are whole numbers: no product and no sum is rounded."""
    with torch.no_grad():
        for p in keys.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    return torch.randint(-1, 2, x.shape).float()


@pytest.mark.parametrize("k", [1, 4, 7, 8, 49])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0, 3)], ids=str)
def test_product_keys_are_the_k_best_of_all(k, lead):
    keys, x = made(k=k), torch.randn(*lead, 13)
    indices, scores = keys.search(x)
    whole = all_scores(keys, x)
    assert torch.equal(scores, whole.gather(-1, by_sort(whole, k))) and indices.shape == (*lead, 3, k)
    assert torch.equal(indices, by_sort(whole, k))
    chosen, weights = keys(x)
    assert torch.equal(chosen, indices.flatten(-2))
    assert torch.equal(weights, scores.softmax(-1).flatten(-2))


@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_of_equal_product_keys_the_lowest_index(k):
    keys = made(experts=36, k=k)
    x = whole_numbers(keys, torch.empty(40, 13))
    whole = all_scores(keys, x)
    assert (whole.sort(-1).values.diff(dim=-1) == 0).any(-1).all()
    assert torch.equal(keys.search(x)[0], by_sort(whole, k))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_key_scores_are_products_of_halves_of_queries_and_keys(batch_norm):
    keys = made(batch_norm=batch_norm).eval()
    x = whole_numbers(keys, torch.empty(2, 3, 13))
    expected = torch.zeros(2, 2, 3, 3, 7)
    if batch_norm:
        keys.norm.running_var.fill_(4.0)
        keys.norm.running_mean.copy_(torch.randint(-3, 3, (30,)))
        keys.norm.eps = 0.0
    for s, t, h, half, i in itertools.product(range(2), range(3), range(3), range(2), range(7)):
        for f in range(5):
            row = h * 10 + half * 5 + f
            q = x[s, t] @ keys.query.weight[row] + keys.query.bias[row]
            if batch_norm:
                q = keys.norm.weight[row] * (q - keys.norm.running_mean[row]) / 2 + keys.norm.bias[row]
            expected[half, s, t, h, i] += (q * keys.keys[half, i, f]).detach()
    assert torch.equal(keys.key_scores(x), expected) and expected.any()


def test_gradients_reach_query_and_keys():
    keys, x = made(heads=2).double(), torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    names, values = zip(*keys.named_parameters(), strict=True)
    assert set(names) == {"keys", "query.weight", "query.bias"}

    def weights(x, *values):
        return torch.func.functional_call(keys, dict(zip(names, values, strict=True)), (x,))[1]

    torch.autograd.gradcheck(weights, (x, *(v.detach().requires_grad_() for v in values)), fast_mode=True)


def test_batch_norm_learns_from_the_queries_of_all_rows():
    keys, x = made(batch_norm=True), torch.randn(8, 3, 13) * 5 + 2
    norm = copy.deepcopy(keys.norm)
    norm(keys.query(x).reshape(24, 30))
    keys(x)
    assert torch.equal(keys.norm.running_mean, norm.running_mean) and norm.running_mean.any()
    assert torch.equal(keys.norm.running_var, norm.running_var)


def test_product_keys_choose_and_learn_in_a_layer():
    for selection in ("token", "sample"):
        keys = made()
        layer = Rank1ExpertLinear(13, 9, 49, 12, scoring=keys, selection=selection)
        with torch.no_grad():
            layer.experts_B.normal_()
        x = torch.randn(5, 3, 13)
        indices, weights = keys(x if selection == "token" else x[:, 0])
        base = nn.functional.linear(x, layer.weight, layer.bias)
        inputs = {"x": x, "experts_A": layer.experts_A, "experts_B": layer.experts_B, "indices": indices}
        inputs |= {"gates": weights.detach(), "base_output": base.detach()}
        y = layer(x)
        assert_parity({"y": y.detach()}, inputs, reference=reference)
        y.square().sum().backward()
        assert all(p.grad.any() for p in keys.parameters())
        assert torch.equal(layer.activation_counts, torch.bincount(indices.flatten(), minlength=49))
        assert keys.keys in set(layer.adapter_parameters()) and "scoring.keys" in layer.adapter_state_dict()


def test_product_keys_of_a_batch_have_unit_weights():
    x = torch.randn(5, 3, 13)
    layer = Rank1ExpertLinear(13, 9, 49, 12, scoring=made(), selection="batch", weights="unit")
    chosen = layer.chosen(x)
    counts = torch.bincount(made()(x[:, 0])[0].flatten(), minlength=49)
    assert torch.equal(chosen.indices, by_sort(counts, 12).expand(5, 12)) and chosen.gates is None
    layer.weights = "probability"
    with pytest.raises(
        ValueError, match="weights: got 'probability' with selection='batch' and a scoring that returns"
    ):
        layer(x)


def test_under_autocast_product_keys_choose_as_ever():
    keys, x = made(), torch.randn(6, 13)
    with torch.autocast("cpu", torch.bfloat16):
        inside = keys(x)
    assert all(torch.equal(a, b) for a, b in zip(inside, keys(x), strict=True))
    assert keys(x.bfloat16())[1].dtype == torch.float32


def test_product_keys_compiled_whole():
    torch._dynamo.reset()
    keys, x = made(), torch.randn(6, 13)
    compiled = torch.compile(keys, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), keys(x), strict=True))
    torch._dynamo.reset()


def test_product_keys_start_within_their_bounds_and_again_by_reset_parameters():
    torch.manual_seed(0)
    there = ProductKeyScores(13, 49, 4, key_features=16, batch_norm=True)
    assert there.keys.abs().max() <= 0.25 and there.keys.abs().max() > 0.24
    late = ProductKeyScores(13, 49, 4, key_features=16, batch_norm=True, device="meta").to_empty(device="cpu")
    for t in late.state_dict().values():
        t.fill_(7)
    torch.manual_seed(0)
    late.reset_parameters()
    assert all(torch.equal(t, late.state_dict()[name]) for name, t in there.state_dict().items())
    file = io.BytesIO()
    torch.save(there, file)
    file.seek(0)
    again, x = torch.load(file, weights_only=False), torch.randn(6, 13)
    assert all(torch.equal(a, b) for a, b in zip(again.eval()(x), there.eval()(x), strict=True))
    assert "experts=49, k=4, heads=1, key_features=16" in repr(there)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"experts": 50}, "experts: got 50, expected a perfect square, as 49 or 64"),
        ({"experts": 0}, "experts: got 0"),
        ({"k": 50}, "k: got 50, expected an int from 1 to 49"),
        ({"heads": 0}, "heads: got 0, expected an int of at least 1"),
        ({"key_features": 1.5}, r"key_features: got 1\.5"),
        ({"dtype": torch.int8}, r"dtype: got torch\.int8, expected one of"),
    ],
)
def test_product_keys_name_what_is_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        made(**kw)


def test_product_keys_name_what_is_wrong_with_x():
    with pytest.raises(ValueError, match=r"x: got shape \(2, 12\), expected \[\.\.\., 13\]"):
        made()(torch.randn(2, 12))
    with pytest.raises(TypeError, match="x: got list"):
        made()([1.0])
    with pytest.raises(ValueError, match="in_features: got '13'"):
        ProductKeyScores("13", 49, 4)


PAIR = (torch.zeros(2, 3, 4, dtype=torch.int64), torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (torch.randn(2, 3, 8), ValueError, r"scoring: got scores shape \(2, 3, 8\) from it, expected \(2, 3, 9\) = "),
        (torch.randn(2, 9), ValueError, r"got scores shape \(2, 9\) from it, expected \(2, 3, 9\) = x\.shape\[:-1\]"),
        (torch.ones(2, 3, 9).long(), TypeError, r"scoring: got scores in torch\.int64"),
        (None, TypeError, r"scoring: got NoneType from it, expected scores or \(indices, weights\)"),
        ((PAIR[0],), TypeError, "scoring: got tuple from it"),
        ((PAIR[0], 1.0), TypeError, "scoring: got tuple from it"),
        ((PAIR[1], PAIR[1]), TypeError, r"scoring: got indices in torch\.float32"),
        ((PAIR[0][..., :3], PAIR[1]), ValueError, r"scoring: got indices of shape \(2, 3, 3\)"),
        ((PAIR[0], PAIR[1][:, 0]), ValueError, r"scoring: got weights of shape \(2, 4\)"),
    ],
)
def test_scorings_that_return_what_does_not_fit(found, error, message):
    with pytest.raises(error, match=message):
        choose_experts(found, torch.randn(2, 3, 5), 9, 4, "token", "probability")
    layer = Rank1ExpertLinear(5, 6, 9, 4, scoring=lambda x: found, selection="token")
    with pytest.raises(error, match=message):
        layer(torch.randn(2, 3, 5))


def test_samples_may_have_scores_of_their_own():
    with pytest.raises(ValueError, match=r"expected \(2, 3, 9\) = .*, or \(2, 9\) for samples"):
        choose_experts(torch.randn(3, 9), torch.randn(2, 3, 5), 9, 4, "sample", "unit")
    with pytest.raises(IndexError, match="got 9, expected 0 <= index < 9"):
        choose_experts((PAIR[0] + 9, PAIR[1]), torch.randn(2, 3, 5), 9, 4, "batch", "unit")


def test_compiled_by_inductor_it_is_the_same():
    torch._dynamo.reset()
    scores = torch.cat([torch.randint(-2, 3, (4, 9)).float(), torch.tensor([[0.0, -0.0] * 4 + [0.0]])])
    compiled = torch.compile(top_experts, fullgraph=True)
    assert torch.equal(compiled(scores, 5), by_sort(scores, 5))
    torch._dynamo.reset()
