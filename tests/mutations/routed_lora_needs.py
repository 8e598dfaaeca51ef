"""Mutants of what routed LoRA keeps, and of what it asks of the primitives: no more than a gradient reads."""

from .mutant import NUMBERS, mutants_of

NEEDS = mutants_of(
    "clora_kernels/kernels/routed_lora/algebra.py",
    "algebra",
    NUMBERS,
    [
        (
            "needs-dR-alone",
            "the gradient of routing alone is not computed",
            "return self.lora_B or self.routing or self.scaling",
            "return self.lora_B or self.scaling",
        ),
        (
            "needs-dscaling-alone",
            "the gradient of scaling alone is not computed",
            "return self.lora_B or self.routing or self.scaling",
            "return self.lora_B or self.routing",
        ),
        (
            "needs-p-for-dgate",
            "p is not saved where only the gate learns",
            "return self.of_U or self.gate",
            "return self.of_U",
        ),
        (
            "needs-h-for-dgate",
            "h is not made where only the gate learns",
            "whole = reads_g or need.gate",
            "whole = reads_g",
        ),
        (
            "keeps-q-beside-a-gate",
            "beside a gate q is kept, not p",
            "return j.gate is not None or j.routing_index is not None",
            "return j.routing_index is not None",
        ),
        (
            "keeps-p-always",
            "p is kept, unrounded, where q would do",
            "return j.gate is not None or j.routing_index is not None",
            "return True",
        ),
        (
            "kept-exchanged",
            "p and q change places in what is kept",
            "kept.append(p if keeps_p(j) else q)",
            "kept.append(q if keeps_p(j) else p)",
        ),
        (
            "q-of-U-unrounded",
            "beside a gate dB and dR are made of an unrounded q",
            "q = q if j.bank else cast(q, dy.dtype)",
            "q = q if j.bank else cast(q, acc)",
        ),
        (
            "asks-for-p-always",
            "forward asks for p where nothing keeps it",
            "_gate(j, acc, lead), keeps_p(j), not j.bank)",
            "_gate(j, acc, lead), True, not j.bank)",
        ),
        (
            "asks-for-h-always",
            "backward asks for h where no gate learns",
            "gate, need.gate, reads_g)",
            "gate, True, reads_g)",
        ),
        (
            "asks-for-h-live",
            "backward asks for h_live, which nothing reads",
            "gate, False, True)] if split",
            "gate, True, True)] if split",
        ),
        (
            "packs-C-live-in-forward",
            "forward packs C_live, which it does not read",
            "kernels.pack(j, dtype, True, True, False)",
            "kernels.pack(j, dtype, True, True, j.frozen_routing is not None)",
        ),
        (
            "packs-A-always",
            "backward packs A where no dx is wanted",
            "wants = (need_x, whole or",
            "wants = (True, whole or",
        ),
        (
            "packs-C-always",
            "backward packs C where nothing reads it",
            "wants = (need_x, whole or",
            "wants = (need_x, True or",
        ),
        (
            "packs-C-live-always",
            "backward packs C_live where lora_A does not learn",
            "split and not j.bank)\n",
            "j.frozen_routing is not None and not j.bank)\n",
        ),
        (
            "packs-nothing-in-vain",
            "backward calls pack where it needs nothing of it",
            "kernels.pack(j, dy.dtype, *wants) if any(wants) else Packed(None, None, None)",
            "kernels.pack(j, dy.dtype, *wants)",
        ),
    ],
)
