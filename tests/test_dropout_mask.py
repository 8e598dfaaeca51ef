"""The dropout mask: the definition against published vectors and an independent Philox, the compiled operator against
the definition."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clora_kernels import dropout_mask, extension
from clora_kernels.kernels import dropout_mask as kernels
from clora_kernels.reference import dropout_mask as reference

native = pytest.mark.skipif(
    not extension.has_op("dropout_mask", "cpu"), reason=f"no compiled operator: {extension.status()[0].detail}"
)
PATHS = [
    pytest.param(kernels.dropout_mask, id="native", marks=native),
    pytest.param(reference.dropout_mask, id="plain"),
]

KNOWN_ANSWERS = [  # Random123's known-answer vectors for philox4x32-10: counter, key, output
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python integers, written from the paper's figure: no code shared with the package."""
    left_0, right_0, left_1, right_1 = counter
    for _ in range(10):
        product_0, product_1 = left_0 * 0xD2511F53, left_1 * 0xCD9E8D57
        left_0, right_0 = (product_1 >> 32) ^ right_0 ^ key[0], product_1 % 2**32
        left_1, right_1 = (product_0 >> 32) ^ right_1 ^ key[1], product_0 % 2**32
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return [left_0, right_0, left_1, right_1]


def kept(seed: int, threshold: int, row: int, column: int, columns: int) -> bool:
    counter = row * math.ceil(columns / 8) + column // 8
    words = philox([counter % 2**32, counter >> 32, 0, 0], [seed % 2**32, (seed >> 32) % 2**32])
    lane = column % 8
    return (words[lane // 2] >> (16 * (lane % 2))) % 2**16 >= threshold


def mask_of(path, seed: int, threshold: int, first_row: int, rows: int, columns: int) -> torch.Tensor:
    return path(torch.tensor(seed), torch.tensor(threshold), first_row, rows, columns)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox(counter, key) == expected
    words = reference.philox_4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("seed, first_row", [(0, 0), (-1, 3), (0x123456789ABCDEF, 2**32 - 1), (-(2**63), 2**50 + 5)])
def test_equals_the_scalar_definition(path, columns, seed, first_row):
    mask = mask_of(path, seed, 20000, first_row, 3, columns)
    assert mask.dtype == torch.bool and mask.shape == (3, columns) and mask.is_contiguous()
    expected = [[kept(seed, 20000, first_row + m, k, columns) for k in range(columns)] for m in range(3)]
    assert mask.tolist() == expected


@native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    threshold=st.integers(0, 65536),
    first_row=st.integers(0, 2**40),
    rows=st.integers(0, 70),
    columns=st.integers(0, 300),
)
def test_native_is_bit_equal_to_the_plain_one(seed, threshold, first_row, rows, columns):
    arguments = (seed, threshold, first_row, rows, columns)
    assert torch.equal(mask_of(kernels.dropout_mask, *arguments), mask_of(reference.dropout_mask, *arguments))


@native
@pytest.mark.parametrize("columns", [4096, 2049])
def test_many_threads_and_blocks(columns):
    arguments = (5, 6554, 11, 160, columns)
    expected = mask_of(reference.dropout_mask, *arguments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(mask_of(kernels.dropout_mask, *arguments), expected), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("columns", [8, 133])
def test_chunks_of_rows_are_the_rows_of_the_whole(path, columns):
    whole = mask_of(path, 77, 30000, 4, 50, columns)
    cuts = [0, 1, 18, 18, 49, 50]
    chunks = [mask_of(path, 77, 30000, 4 + a, b - a, columns) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("path", PATHS)
def test_the_ends_of_the_threshold_and_empty_masks(path):
    assert mask_of(path, 3, 0, 0, 40, 50).all()
    assert not mask_of(path, 3, 65536, 0, 40, 50).any()
    assert mask_of(path, 3, 100, 9, 0, 50).shape == (0, 50)
    assert mask_of(path, 3, 100, 9, 5, 0).shape == (5, 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_and_independence(path, p):
    rows, columns = 512, 1024
    mask = mask_of(path, 2024, round(65536 * p), 0, rows, columns).double()
    deviation = math.sqrt(p * (1 - p))
    bound = 5 * deviation / math.sqrt(rows * columns)
    assert abs(mask.mean().item() - (1 - round(65536 * p) / 65536)) < bound
    assert (mask.mean(0) - (1 - p)).abs().max() < 6 * deviation / math.sqrt(rows)
    assert (mask.mean(1) - (1 - p)).abs().max() < 6 * deviation / math.sqrt(columns)
    centred = mask - mask.mean()
    for row_step, column_step in [(0, 1), (0, 2), (0, 8), (1, 0), (1, 1)]:
        product = centred[row_step:, column_step:] * centred[: rows - row_step, : columns - column_step]
        assert abs(product.mean().item()) < 5 * p * (1 - p) / math.sqrt(product.numel())


@pytest.mark.parametrize("path", PATHS)
def test_seeds_and_rows_draw_different_masks(path):
    masks = [mask_of(path, seed, 32768, row, 8, 64) for seed in (1, 2, 2**32 + 1, -1) for row in (0, 8)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.3 < (one ^ other).double().mean().item() < 0.7


@native
def test_operator_passes_opcheck():
    operator = torch.ops.clora_kernels.dropout_mask.default
    for rows, columns in [(5, 24), (3, 7), (0, 8)]:
        torch.library.opcheck(operator, (torch.tensor(5), torch.tensor(6554), 2, rows, columns))


@native
def test_fake_and_meta_have_the_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        mask = mask_of(torch.ops.clora_kernels.dropout_mask.default, 1, 2, 0, 6, 11)
    assert mask.shape == (6, 11) and mask.dtype == torch.bool


@pytest.mark.parametrize("has_native", [pytest.param(True, marks=native), False])
def test_compiles_into_one_graph_for_all_sizes(has_native, monkeypatch):
    if not has_native:
        monkeypatch.setattr(extension, "_kernels", frozenset())
        monkeypatch.setattr(extension, "_warned", {"dropout_mask"})
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def draw(seed, threshold, x):
        return kernels.dropout_mask(seed, threshold, 0, x.shape[0], x.shape[1])

    for shape in [(4, 10), (9, 33), (130, 8)]:
        drawn = draw(torch.tensor(3), torch.tensor(30000), torch.empty(shape))
        assert torch.equal(drawn, mask_of(reference.dropout_mask, 3, 30000, 0, *shape))
    assert len(graphs) == (1 if has_native else 2)  # the plain one has nothing to cut where columns fill their groups


SCALAR, FLOAT, VECTOR = torch.tensor(1), torch.tensor(1.0), torch.tensor([1])


@native
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((FLOAT, SCALAR, 0, 2, 8), "seed must be an int64"),
        ((VECTOR, SCALAR, 0, 2, 8), "seed must be a 0-dim"),
        ((SCALAR, FLOAT, 0, 2, 8), "threshold must be an int64"),
        ((SCALAR, VECTOR, 0, 2, 8), "threshold must be a 0-dim"),
        ((SCALAR, torch.tensor(-1), 0, 2, 8), "threshold must be within 0..65536, got -1"),
        ((SCALAR, torch.tensor(65537), 0, 2, 8), "threshold must be within 0..65536, got 65537"),
        ((SCALAR, SCALAR, -1, 2, 8), "first_row must not be negative, got -1"),
        ((SCALAR, SCALAR, 0, -2, 8), "rows must not be negative, got -2"),
        ((SCALAR, SCALAR, 0, 2, -8), "columns must not be negative, got -8"),
        ((SCALAR, SCALAR, 2**62, 2, 33), "counters beyond 63 bits"),
        ((SCALAR, SCALAR, 2**63 - 1, 1, 8), "counters beyond 63 bits"),
    ],
)
def test_operator_refuses(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.clora_kernels.dropout_mask(*arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((FLOAT, SCALAR, 0, 2, 8), TypeError, "seed must be an int64"),
        ((VECTOR, SCALAR, 0, 2, 8), ValueError, "seed must be a 0-dim"),
        ((SCALAR, FLOAT, 0, 2, 8), TypeError, "threshold must be an int64"),
        ((SCALAR, VECTOR, 0, 2, 8), ValueError, "threshold must be a 0-dim"),
        ((SCALAR, SCALAR, -1, 2, 8), ValueError, "first_row must not be negative, got -1"),
        ((SCALAR, SCALAR, 0, -2, 8), ValueError, "rows must not be negative, got -2"),
        ((SCALAR, SCALAR, 0, 2, -8), ValueError, "columns must not be negative, got -8"),
    ],
)
def test_plain_one_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        reference.dropout_mask(*arguments)


@pytest.mark.parametrize("compiled", [False, True])
def test_fallback_warns_once_and_says_how_to_build(compiled, monkeypatch):
    monkeypatch.setattr(extension, "_kernels", frozenset())
    monkeypatch.setattr(extension, "_warned", set())
    torch._dynamo.reset()
    path = torch.compile(kernels.dropout_mask, fullgraph=True, backend="eager") if compiled else kernels.dropout_mask
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        masks = [mask_of(path, 7, 20000, 0, 6, 20) for _ in range(3)]
    assert len(caught) == 1 and caught[0].category is RuntimeWarning
    assert "no compiled dropout_mask for cpu" in str(caught[0].message)
    assert "pip install --no-build-isolation ." in str(caught[0].message)
    assert all(torch.equal(mask, mask_of(reference.dropout_mask, 7, 20000, 0, 6, 20)) for mask in masks)


@native
def test_native_path_does_not_warn_and_is_the_one_taken(monkeypatch):
    monkeypatch.setattr(reference, "dropout_mask", lambda *_: pytest.fail("the plain path ran"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mask_of(kernels.dropout_mask, 7, 20000, 0, 6, 20).shape == (6, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("columns", [4096, 2049, 7])
def test_cuda_is_bit_equal(columns):
    arguments = (-9, 20000, 2**33, 70, columns)
    expected = mask_of(reference.dropout_mask, *arguments)
    for threshold in (torch.tensor(20000), torch.tensor(20000, device="cuda")):
        assert extension.has_op("dropout_mask", "cuda"), extension.status()[1]
        drawn = kernels.dropout_mask(torch.tensor(-9, device="cuda"), threshold, *arguments[2:])
        assert drawn.is_cuda and torch.equal(drawn.cpu(), expected)


def test_public_function_masks_every_row_of_any_shape():
    x, seed = torch.empty(3, 5, 24), torch.tensor(3)
    mask = dropout_mask(x, 0.5, seed)
    assert torch.equal(mask.flatten(0, 1), mask_of(reference.dropout_mask, 3, 32768, 0, 15, 24))
    assert dropout_mask(x, 0.0, seed).all() and not dropout_mask(x, 1.0, seed).any()
    with pytest.raises(TypeError, match="dropout_seed: got None"):
        dropout_mask(x, 0.5, None)


def test_plain_path_starts_at_its_first_row(monkeypatch):
    monkeypatch.setattr(extension, "_kernels", frozenset())
    monkeypatch.setattr(extension, "_warned", {"dropout_mask"})
    whole, part = (mask_of(kernels.dropout_mask, 3, 32768, first, rows, 24) for first, rows in ((0, 7), (4, 3)))
    assert torch.equal(part, whole[4:])
