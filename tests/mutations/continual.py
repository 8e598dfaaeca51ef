"""Mutants of the losses of continual learning, of their options and of files of a run."""

from .mutant import mutants_of

CONTINUAL = mutants_of(
    "clora_kernels/continual/losses.py",
    "losses",
    ("tests/test_continual_losses.py", "tests/test_continual_clora.py"),
    [
        (
            "basis-transposed",
            "the rows of the routing are measured in the transposed basis",
            "(basis.mT @ routing).square().sum()",
            "(basis @ routing).square().sum()",
        ),
        (
            "routing-transposed",
            "the columns of the routing are measured, not its rows",
            "(basis.mT @ routing).square().sum()",
            "(basis.mT @ routing.mT).square().sum()",
        ),
        (
            "not-squared",
            "the norm is not squared",
            "(basis.mT @ routing).square().sum()",
            "(basis.mT @ routing).norm()",
        ),
        (
            "mean",
            "a mean in place of the sum",
            "(basis.mT @ routing).square().sum()",
            "(basis.mT @ routing).square().mean()",
        ),
        (
            "right-vectors",
            "right singular vectors in place of left ones",
            "left, sigma, _ = torch.linalg.svd(matrix.double())",
            "left, sigma, _ = torch.linalg.svd(matrix.double().mT)",
        ),
        (
            "energy-not-squared",
            "energy is measured in singular values, not in their squares",
            "held = sigma.square().cumsum(-1)\n    before = held - sigma.square()",
            "held = sigma.cumsum(-1)\n    before = held - sigma",
        ),
        (
            "one-vector-too-few",
            "the vector that reaches the energy is left out",
            "(before < energy * held[..., -1:])",
            "(held < energy * held[..., -1:])",
        ),
        (
            "rounding-taken-for-rank",
            "vectors of singular values that are rounding alone are taken at energy 1",
            " & (sigma > matrix.shape[-1] * eps * sigma[..., :1])",
            "",
        ),
        (
            "rows-in-place-of-columns",
            "rows are left out in place of columns",
            "left * wanted[..., None, :]",
            "left * wanted[..., :, None]",
        ),
        ("energy-unchecked", "an energy above 1 is not refused", "if not 0.0 <= value <= 1.0:", "if not 0.0 <= value:"),
        (
            "leading-dimensions-unchecked",
            "other leading dimensions are not refused",
            "if routing.shape[:-2] != basis.shape[:-2] or ",
            "if ",
        ),
        (
            "norm-of-one-factor",
            "the norm of a product is the product of norms",
            'torch.linalg.qr(left.double(), "r").R @ torch.linalg.qr(right.double(), "r").R.mT',
            "left.double().norm() * right.double().norm().reshape(1, 1)",
        ),
    ],
)

CONTINUAL += mutants_of(
    "clora_kernels/continual/losses.py",
    "losses",
    ("tests/test_continual_losses.py", "tests/test_continual_clora.py"),
    [
        ("fraction-of-anything", "an energy that is no number is not told",
         "    check_number(name, value)\n    if not 0.0 <= value", "    if not 0.0 <= value"),
        ("complex-number", "a complex number passes for a number", "numbers.Real", "numbers.Number"),
        ("number-of-any-kind", "what is no number is not told",
         "or not isinstance(value, numbers.Real):", "or value is None:"),
        ("bool-is-a-number", "True passes for 1", "if isinstance(value, bool) or not", "if not"),
        ("overlap-signed", "overlaps of opposite signs cancel",
         "(new @ old.mT).abs().sum()", "(new @ old.mT).sum().abs()"),
        ("overlap-squared", "overlaps are squared", "(new @ old.mT).abs().sum()", "(new @ old.mT).square().sum()"),
        ("overlap-mean", "a mean over the rows in place of the sum",
         "(new @ old.mT).abs().sum()", "(new @ old.mT).abs().mean(-1).sum()"),
        ("overlap-old-fixed", "earlier rows get no gradient", "(new @ old.mT)", "(new @ old.detach().mT)"),
        ("ago-summed", "AGO is a sum over layers",
         "for overlap in overlaps]).mean()", "for overlap in overlaps]).sum()"),
        ("ago-of-rows", "AGO is of rows", "pairwise_overlap(B.mT, B_old.mT)", "pairwise_overlap(B, B_old)"),
        ("ago-layers-unchecked", "AGO of no layer is not told",
         "if not experts or len(experts) != len(old):", "if len(experts) != len(old):"),
        ("divergence-undefined", "a change that is not a number passes for one that is not defined",
         "return None if whole == 0 else float((changed / whole).sqrt())",
         "return float((changed / whole).sqrt()) if whole > 0 else None"),
        ("zero-over-zero", "a change of nothing is not a number",
         "return None if whole == 0 else float", "return float"),
        ("overlap-leading-unchecked", "rows of other leading dimensions are not refused",
         "if new.shape[:-2] != old.shape[:-2] or new", "if new"),
        ("negative-energy", "a negative energy is not refused", "if not 0.0 <= value <= 1.0:", "if value > 1.0:"),
    ],
)  # fmt: skip
CONTINUAL += mutants_of(
    "clora_kernels/continual/clora.py",
    "clora",
    ("tests/test_continual_clora.py",),
    [
        ("weight-unchecked", "a weight that no loss is weighed by is not told",
         '        check_weight("orthogonality", orthogonality)\n', ""),
        ("energy-unchecked-at-first", "a wrong energy is told when a task ends",
         '        check_fraction("energy", energy)\n', ""),
    ],
)  # fmt: skip
CONTINUAL += mutants_of(
    "clora_kernels/continual/checkpoint.py",
    "checkpoint",
    ("tests/test_continual_checkpoint.py",),
    [
        ("garbage-untold", "a file of garbage is told in the words of safetensors",
         "except SafetensorError as error:", "except KeyError as error:"),
        ("missing-untold", "a file that is not there is told in the words of safetensors",
         "    if not Path(path).is_file():\n", "    if path is None:\n"),
        ("another-file", "a file of other tensors passes for a run",
         'if structure.keys() != {"settings", "method", "rng", "objects"}:', "if structure is None:"),
        ("file-without-metadata", "a file without metadata is not told",
         '(file.metadata() or {}).get("structure", "{}")', 'file.metadata()["structure"]'),
    ],
)  # fmt: skip
CONTINUAL += mutants_of(
    "clora_kernels/continual/losses.py",
    "weight",
    ("tests/test_continual_clora.py", "tests/test_continual_dac.py"),
    [
        ("no-number", "a weight that is no number is not told",
         "    check_number(name, value)\n    if not 0 <= value < math.inf:", "    if not 0 <= value < math.inf:"),
        ("not-a-number", "a weight of NaN is not refused",
         "if not 0 <= value < math.inf:", "if value < 0 or value == math.inf:"),
        ("infinite", "an infinite weight is not refused",
         "if not 0 <= value < math.inf:", "if not 0 <= value:"),
    ],
)  # fmt: skip
CONTINUAL += mutants_of(
    "clora_kernels/continual/clora.py",
    "clora",
    ("tests/test_continual_clora.py", "tests/test_continual_checkpoint.py"),
    [
        ("basis-unneeded", "a state without the basis is taken",
         'return {"basis": _stacked(self.old_routings()).shape, **self.adapter_shapes("start")}',
         'return self.adapter_shapes("start")'),
        ("kept-after-the-task", "between tasks a basis is asked for", "if not (finished and in_task):",
         "if not finished:"),
        ("start-elsewhere", "A and B of the task's start stay on the device that the model has left",
         '.lora_{x}"].to(layer.lora_A) for x in "AB")', '.lora_{x}"] for x in "AB")'),
    ],
)  # fmt: skip
CONTINUAL += mutants_of(
    "clora_kernels/continual/attached.py",
    "attached",
    ("tests/test_continual_attached.py", "tests/test_continual_checkpoint.py", "tests/test_continual_cl_lora_views.py"),
    [
        ("left-untold", "layers that are left alone are not told",
         'warnings.warn(f"targets: {name} was left alone: {why}", stacklevel=4)', "continue"),
        ("options-by-place", "options that are given by their place are not among the settings",
         "{**dict(zip(places, args, strict=False)), **options}", "options"),
        ("defaults-by-place", "defaults of options that may be given by their place are not among the settings",
         "settings |= {p.name: p.default for p in parameters}",
         "settings |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}"),
        ("targets-are-settings", "a regular expression of targets is a setting",
         '("model", "targets", "backend")', '("model", "backend")'),
        ("unknown-kept", "what a method does not keep is loaded",
         "    if missing or strange:\n        raise", "    if missing:\n        raise"),
        ("kept-of-any-shape", "what is kept has any shape",
         "if tensors[name].shape != torch.Size(shape):", "if tensors[name].dim() != len(shape):"),
        ("kept-unchecked", "what is kept is not looked at",
         "        if shapes is not None:\n", "        if not self.layers:\n"),
        ("any-base", "a model of other weights is taken",
         "if name in self.base and not torch.equal(number.cpu(), self.base[name]):", "if name not in self.layers:"),
        ("shapes-of-all-layers", "a method of some layers asks for all",
         "self.layers if layers is None else layers", "self.layers"),
    ],
)  # fmt: skip
CONTINUAL += mutants_of(
    "clora_kernels/continual/fingerprint.py",
    "fingerprint",
    ("tests/test_continual_checkpoint.py",),
    [
        ("one-row", "the first row alone is looked at", "weight[rows, columns]", "weight[:1, columns]"),
        ("first-places", "the first rows and columns alone are looked at",
         "slice(None, None, max(1, -(-n // SAMPLE)))", "slice(SAMPLE)"),
        ("of-the-dtype", "another dtype of the same values is another weight",
         ".double().flatten()", ".double().mul(weight.element_size()).flatten()"),
        ("quantised", "what holds no floating-point values is looked at", " and weight.is_floating_point()", ""),
        ("meta", "a weight without values is looked at", " and not weight.is_meta", ""),
        ("empty", "an empty weight divides by zero", "max(1, -(-n // SAMPLE))", "-(-n // SAMPLE)"),
    ],
)  # fmt: skip
CONTINUAL += mutants_of(
    "clora_kernels/continual/protocol.py",
    "protocol",
    ("tests/test_continual_protocol.py", "tests/test_continual_checkpoint.py"),
    [
        ("eval-mode", "a model in eval mode is trained", "if not self.model.training:", "if self.model is None:"),
        ("base-unsaved", "a state does not say of which weights it is",
         'here | {f"base.{name}": number for name, number in self.base.items()} | self', "here | self"),
    ],
)  # fmt: skip
