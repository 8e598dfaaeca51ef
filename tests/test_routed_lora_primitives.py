"""What the algorithm asks of its primitives, and what those give: no more than is wanted, each rounded once."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from strategies import dy_for

from clora_kernels import RoutedLoRA
from clora_kernels.autograd.routed_lora.calls import prepare
from clora_kernels.kernels.routed_lora import algebra, aten
from clora_kernels.kernels.routed_lora.algebra import Dropout, Needs, Term
from clora_kernels.reference.routed_lora_samples import make_inputs


class Recorder:
    """The primitives on ATen; writes down what is asked of them and holds their operands to one dtype."""

    def __init__(self):
        self.asked, self.packed = [], []

    def pack(self, j, dtype, A, C, C_live):
        found = aten.pack(j, dtype, A, C, C_live)
        self.packed += [(name, t) for name, t in found._asdict().items() if t is not None]
        flags = zip(("A", "C", "C_live"), (A, C, C_live), strict=True)
        self.asked.append(" ".join(["pack", *(name for name, flag in flags if flag)]))
        return found

    def shrink(self, big, terms):
        assert all(t.small.dtype == big.dtype for t in terms)
        told = []
        for term in terms:
            words = [name for name, t in self.packed if t is term.small]
            words += [word for word in ("masked", "want_sum", "want_gated") if getattr(term, word)]
            told.append(" ".join(words).replace("want_", ""))
        self.asked.append("shrink " + ", ".join(told))
        return aten.shrink(big, terms)

    def linear(self, products, low_rank, bias=None, base_output=None):
        assert len({t.dtype for a, b, *_ in [*products, *low_rank] for t in (a, b)}) == 1
        self.asked.append("linear")
        return aten.linear(products, low_rank, bias, base_output)

    def reduce(self, small, big, dropout):
        assert all(t.dtype == big.dtype for t in small)
        self.asked.append("reduce")
        return aten.reduce(small, big, dropout)

    def unpack(self, j, U, need):
        self.asked.append("unpack")
        return aten.unpack(j, U, need)


def projection_of(inputs):
    """x and the projection that the public function would make of these arguments."""
    x, (projection,) = prepare(inputs["x"], [RoutedLoRA(**{k: v for k, v in inputs.items() if k != "x"})], None)
    if "dropout_seed" in inputs:
        threshold = torch.tensor(round(inputs["dropout_p"] * 65536), device=x.device)
        projection = projection._replace(seed=inputs["dropout_seed"], threshold=threshold)
    return x, projection


OPTIONS = {
    "plain": {},
    "gated": {"gate": (5,), "dropout_p": 0.2},
    "frozen": {"frozen": True},
    "frozen gated": {"frozen": True, "gate": (5,), "dropout_p": 0.2},
    "bank": {"bank": 2, "frozen": True, "gate": (5,), "dropout_p": 0.2},
}
FORWARD = {name: ["pack A C", "shrink A masked gated", "linear"] for name in ("plain", "frozen")}
FORWARD |= {name: ["pack A C", "shrink A masked sum gated", "linear"] for name in ("gated", "frozen gated")}
FORWARD["bank"] = ["pack A C", "shrink A masked sum", "linear"]
U = ["reduce", "unpack"]
BACKWARD = {
    ("plain", "x"): ["pack A C", "shrink C gated", "linear"],
    ("plain", "lora_A"): ["pack C", "shrink C gated", "reduce"],
    ("plain", "lora_B"): U,
    ("plain", "bias"): [],
    ("gated", "x"): ["pack A C", "shrink C gated", "linear"],
    ("gated", "x gate"): ["pack A C", "shrink C sum gated", "linear"],
    ("gated", "lora_A lora_B"): ["pack C", "shrink C gated", *U, "reduce"],
    ("frozen", "x"): ["pack A C", "shrink C gated", "linear"],
    ("frozen", "lora_A"): ["pack C_live", "shrink C_live gated", "reduce"],
    ("frozen", "routing scaling"): U,
    ("frozen gated", "x gate"): ["pack A C", "shrink C sum gated", "linear"],
    ("frozen gated", "x lora_A"): ["pack A C C_live", "shrink C gated, C_live gated", "linear", "reduce"],
    ("frozen gated", "x lora_A gate"): ["pack A C C_live", "shrink C sum gated, C_live gated", "linear", "reduce"],
    ("bank", "x"): ["pack A C", "shrink C sum", "linear"],
    ("bank", "lora_A"): ["pack C", "shrink C sum", "reduce"],
    ("bank", "lora_B"): ["reduce"],
    ("bank", "routing"): ["pack C", "shrink C sum"],
    ("bank", "gate"): ["pack C", "shrink C sum"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_no_more_is_asked_than_is_read(device, options):
    """Sums that nobody reads, and small operands that nobody multiplies by, cost time and tell in no number."""
    inputs = make_inputs(**OPTIONS[options], dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    x, j = projection_of(inputs)
    forward = Recorder()
    _, kept = algebra.forward(forward, x, [j])
    assert forward.asked == FORWARD[options]
    for (of, names), asked in BACKWARD.items():
        if of == options:
            need = Needs(**{field: field in names.split() for field in Needs._fields})
            recorder, need_x = Recorder(), "x" in names.split()
            algebra.backward(recorder, [dy_for(inputs)], x, [j], kept, need_x, [need], x.dtype)
            assert recorder.asked == asked, names


@pytest.mark.parametrize("options", OPTIONS)
def test_q_is_kept_as_it_is_used_and_p_unrounded_where_a_gate_or_a_bank_needs_it(device, options):
    inputs = make_inputs(**OPTIONS[options], dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    x, j = projection_of(inputs)
    _, (kept,) = algebra.forward(aten, x, [j])
    assert kept.dtype == (torch.float32 if "gate" in inputs or "routing_index" in inputs else torch.bfloat16)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_come_in_the_dtype_of_what_they_are_for(device, options):
    """Autograd casts those of a Function; of an operator nobody does."""
    inputs = make_inputs(**OPTIONS[options], dtype=torch.bfloat16, scaling=None, device=device)
    x, j = projection_of(inputs)
    _, kept = algebra.forward(aten, x, [j])
    need = Needs(**{field: getattr(j, field) is not None for field in Needs._fields})
    dx, (grads,) = algebra.backward(aten, [dy_for(inputs)], x, [j], kept, True, [need], x.dtype)
    for got, like in zip([dx, *grads], [x, *(getattr(j, field) for field in Needs._fields)], strict=True):
        assert got is like is None or (got.dtype, got.shape) == (like.dtype, like.shape)


def whole_numbers(shape, largest, device):
    return torch.randint(-largest, largest + 1, shape, device=device).float()


@pytest.mark.parametrize("frozen", [False, True])
def test_pack_makes_what_is_asked_with_one_rounding(device, frozen):
    """Of whole numbers the products are exact in fp32, and nothing but the one rounding to bf16 is left."""
    inputs = make_inputs(device=device, frozen=frozen, dtype=torch.bfloat16, adapter_dtype=torch.float32, scaling=None)
    _, j = projection_of(inputs)
    R = whole_numbers(j.routing.shape, 9, device)
    R_frozen = whole_numbers(R.shape, 9, device) if frozen else torch.zeros_like(R)
    A, B = whole_numbers(j.lora_A.shape, 2000, device), whole_numbers(j.lora_B.shape, 2000, device)
    j = j._replace(lora_A=A, lora_B=B, routing=R, frozen_routing=R_frozen if frozen else None)
    j = j._replace(scaling=torch.tensor(3.0, device=device))
    expected = (A, 3 * (R_frozen + R) @ B.mT, 3 * R @ B.mT)
    for flags in product([False, True], repeat=3):
        packed = aten.pack(j, torch.bfloat16, *flags)
        for got, want, flag in zip(packed, expected, flags, strict=True):
            assert torch.equal(got, want.bfloat16()) and got.dtype == torch.bfloat16 if flag else got is None


def test_unpack_makes_what_is_wanted(device):
    inputs = make_inputs(device=device, frozen=True, dtype=torch.bfloat16, adapter_dtype=torch.float32, scaling=None)
    _, j = projection_of(inputs)
    j = j._replace(routing=j.routing.bfloat16())
    U_ = torch.randn(j.lora_A.shape[0], j.lora_B.shape[0], device=device)
    whole = aten.unpack(j, U_, Needs(*[True] * 7))
    inputs_ = (j.lora_B, j.routing, j.scaling)
    assert [(g.shape, g.dtype) for g in whole] == [(t.shape, t.dtype) for t in inputs_]
    for lora_B, routing, scaling in product([False, True], repeat=3):
        found = aten.unpack(j, U_, Needs(False, False, lora_B, routing, False, False, scaling))
        for got, want, flag in zip(found, whole, (lora_B, routing, scaling), strict=True):
            assert torch.equal(got, want) if flag else got is None


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("acts", ["", "gate", "dropout", "gate dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shrink_gives_what_is_wanted(device, dtype, acts, terms):
    """The sum in fp32 and, in the dtype of the big operand, what is gated: whole numbers, so to the last bit."""
    big = whole_numbers((9, 21), 9, device).to(dtype)
    small = whole_numbers((4, 21), 9, device).to(dtype)
    gate = whole_numbers((9, 4), 3, device) if "gate" in acts else None
    seed, threshold = torch.tensor(7, device=device), torch.tensor(32768, device=device)
    dropout = Dropout(seed, threshold) if "dropout" in acts else None
    for masked, (want_sum, want_gated) in product([False, True], [(True, False), (False, True), (True, True)]):
        kept = aten.dropout_mask(seed, threshold, 0, 9, 21) if masked and dropout else torch.ones_like(big)
        sums = (big.float() * kept.float()) @ small.float().mT
        gated = sums * (1 if gate is None else gate) * (1 if dropout is None else 2)
        for p, q in aten.shrink(big, [Term(small, dropout, masked, gate, want_sum, want_gated)] * terms):
            assert torch.equal(p, sums) and p.dtype == torch.float32 if want_sum else p is None
            assert torch.equal(q, gated.to(dtype)) and q.dtype == dtype if want_gated else q is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_add_up(device, mask_path, monkeypatch, dtype, masked):
    """reduce and shrink of several small operands over blocks of 64 rows and a rest."""
    monkeypatch.setattr(aten, "SCRATCH_BYTES", {"cpu": 1, "cuda": 1})
    M, K, seed, threshold = 150, 21, torch.tensor(7, device=device), torch.tensor(32768, device=device)
    big = whole_numbers((M, K), 9, device).to(dtype)
    dropout = Dropout(seed, threshold) if masked else None
    seen = big.float() * (aten.dropout_mask(seed, threshold, 0, M, K).float() if masked else 1)
    tall, flat = ([whole_numbers(size, 3, device).to(dtype) for size in sizes] for sizes in SIZES)
    for got, small in zip(aten.reduce(tall, big, [dropout] * 2), tall, strict=True):
        assert torch.equal(got, small.float().mT @ seen)
    found = aten.shrink(big, [Term(small, dropout, True, None, True, False) for small in flat])
    for (got, _), small in zip(found, flat, strict=True):
        assert torch.equal(got, seen @ small.float().mT)


SIZES = (((150, 3), (150, 4)), ((3, 21), (4, 21)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("products", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_laid_down_counts_whole(dtype, products, masked, device, monkeypatch):
    """Half of the low-rank term, doubled as the large product accumulates on it, is the term: bit for bit where the
    sums are exact. On a CPU nothing is halved of itself."""
    M, K, N, r = 21, 19, 13, 3
    draw = aten.Dropout(torch.tensor(7, device=device), torch.tensor(20000, device=device)) if masked else None
    integers = lambda *shape: torch.randint(-4, 5, shape, device=device).to(dtype)  # noqa: E731
    large = [(integers(M, K), integers(K, N)) for _ in range(products)]
    low = [(integers(M, r), integers(r, N), draw) for _ in range(2)]
    found = {}
    for share in (1.0, 0.5):
        monkeypatch.setattr(aten, "_share_laid_down", lambda q, share=share: share)
        found[share] = aten.linear(large, low)
    assert torch.equal(found[1.0], found[0.5]) and found[1.0].dtype == dtype
    kept = aten.dropout_mask(draw.seed, draw.threshold, 0, M, N).double() if masked else 1.0
    truth = sum(a.double() @ b.double() for a, b in large) + sum(kept * (q.double() @ C.double()) for q, C, _ in low)
    assert torch.equal(found[1.0], truth.to(dtype))
