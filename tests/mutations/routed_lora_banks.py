"""Mutants of the algorithm of routed LoRA where a bank gives each sample a routing."""

from .mutant import NUMBERS, mutants_of

_IN_ALGEBRA = mutants_of(
    "clora_kernels/kernels/routed_lora/algebra.py",
    "algebra",
    NUMBERS,
    [
        (
            "scale-skipped-in-bank-dB",
            "dB of a bank is not scaled",
            'dB = (U["live"].mT * j.scaling).to(',
            'dB = U["live"].mT.to(',
        ),
        (
            "bank-skipped-in-y",
            "y without the routings of a bank",
            "q = per_sample(q, total_routing(j, acc), j.routing_index).to(dtype)",
            "q = q.to(dtype)",
        ),
        (
            "bank-frozen-forgotten-in-dx",
            "dx of a bank without the frozen routings",
            "h = per_sample(h_prime, total.mT, index)",
            "h = per_sample(h_prime, live.mT, index)",
        ),
        (
            "bank-transposed-in-dx",
            "dx of a bank through transposed routings",
            "h = per_sample(h_prime, total.mT, index)",
            "h = per_sample(h_prime, total, index)",
        ),
        (
            "bank-transposed-in-dA",
            "dA of a bank through transposed routings",
            "apply_gate(per_sample(h_prime, live.mT, index)",
            "apply_gate(per_sample(h_prime, live, index)",
        ),
        (
            "bank-frozen-reaches-dB",
            "dB of a bank through the whole routings",
            'small["live"] = per_sample(q, live, index)',
            'small["live"] = per_sample(q, total, index)',
        ),
        (
            "bank-frozen-forgotten-in-dscaling",
            "the gradient of scaling of a bank without the frozen routings",
            'small["total"] = per_sample(q, total, index)',
            'small["total"] = per_sample(q, live, index)',
        ),
        (
            "needs-h-for-bank-dR",
            "h' is not made where only a bank learns",
            "(j.bank and (split or need.routing))",
            "(j.bank and split)",
        ),
        (
            "bank-asks-for-q",
            "with a bank forward asks for a q that is not routed yet",
            "keeps_p(j), not j.bank)",
            "keeps_p(j), True)",
        ),
        (
            "bank-keeps-q",
            "with a bank q is kept, not p",
            "return j.gate is not None or j.routing_index is not None",
            "return j.gate is not None",
        ),
        (
            "bank-gate-forgotten-in-y",
            "y of a bank without the gate",
            "q = apply_gate(p, term.dropout, term.gate)",
            "q = apply_gate(p, term.dropout, None)",
        ),
        (
            "bank-gate-forgotten-in-dx",
            "dx of a bank without the gate",
            "g = apply_gate(h, dropout, gate).to(dtype)",
            "g = apply_gate(h, dropout, None).to(dtype)",
        ),
        (
            "bank-gate-forgotten-in-dA",
            "dA of a bank beside frozen routings without the gate",
            "live.mT, index), dropout, gate)",
            "live.mT, index), dropout, None)",
        ),
        (
            "bank-kept-value-skipped-in-y",
            "kept elements are not scaled up in y of a bank",
            "q = apply_gate(p, term.dropout, term.gate)",
            "q = apply_gate(p, None, term.gate)",
        ),
        (
            "bank-kept-value-skipped-in-dx",
            "kept elements are not scaled up in dx of a bank",
            "g = apply_gate(h, dropout, gate).to(dtype)",
            "g = apply_gate(h, None, gate).to(dtype)",
        ),
        (
            "bank-kept-value-skipped-in-dA",
            "kept elements are not scaled up in dA of a bank beside frozen routings",
            "live.mT, index), dropout, gate)",
            "live.mT, index), None, gate)",
        ),
        (
            "bank-frozen-reaches-dA",
            "dA of a bank is made of h, the frozen routings included",
            ".to(dtype) if split else g\n",
            ".to(dtype) if False else g\n",
        ),
        (
            "bank-frozen-forgotten-in-y",
            "y of a bank without the frozen routings",
            "q = per_sample(q, total_routing(j, acc), j.routing_index)",
            "q = per_sample(q, j.routing.to(acc), j.routing_index)",
        ),
        (
            "bank-q-rounded-before-routing",
            "with a bank dB and dR are made of a q that was rounded before it was routed",
            "q = q if j.bank else cast(q, dy.dtype)",
            "q = cast(cast(q, dy.dtype), q.dtype if j.bank else dy.dtype)",
        ),
        (
            "bank-needs-h-for-dA",
            "h' of a bank is not made where only lora_A learns beside frozen routings",
            "(j.bank and (split or need.routing))",
            "(j.bank and need.routing)",
        ),
        (
            "bank-packs-C-live",
            "with a bank backward packs C_live, which nothing reads",
            "split and not j.bank)\n",
            "split)\n",
        ),
        (
            "bank-scale-skipped-in-dscaling",
            "the gradient of scaling of a bank is made of U transposed the wrong way: dB's",
            'dscaling = (U["total"].mT * j.lora_B',
            'dscaling = (U["live" if "live" in U else "total"].mT * j.lora_B',
        ),
    ],
)

_SMALL_PRODUCTS = mutants_of(
    "clora_kernels/kernels/routed_lora/banks.py",
    "algebra",
    NUMBERS,
    [
        (
            "bank-index-off-by-one",
            "each sample takes the next routing",
            "R.index_select(0, index[b])",
            "R.index_select(0, (index[b] + 1) % R.shape[0])",
        ),
        (
            "bank-dR-transposed",
            "dR of a bank is transposed",
            "(q[b].mT @ h_prime[b]).reshape(-1, r * r)",
            "(h_prime[b].mT @ q[b]).reshape(-1, r * r)",
        ),
        (
            "bank-dR-off-by-one",
            "dR of a bank goes to the next routing",
            "one_hot = (torch.arange(T, device=q.device)[:, None] == index)",
            "one_hot = (torch.arange(T, device=q.device)[:, None] == (index + 1) % T)",
        ),
        (
            "bank-dR-of-the-last-block",
            "dR of a bank keeps only its last block of samples",
            "dR.addmm_(one_hot[:, b],",
            "dR = torch.mm(one_hot[:, b],",
        ),
        (
            "bank-sample-lost-between-blocks",
            "blocks of samples leave one out",
            "yield slice(start, start + size)",
            "yield slice(start, start + max(size - 1, 1))",
        ),
    ],
)

BANKS = _IN_ALGEBRA + _SMALL_PRODUCTS
