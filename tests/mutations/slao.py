"""Mutants of SLAO."""

from .mutant import mutants_of

SLAO = mutants_of(
    "clora_kernels/continual/slao.py",
    "slao",
    ("tests/test_continual_slao.py",),
    [
        ("start-unchanged", "A starts a task as the last one left it", "if self.task == 1:", "if self.task >= 1:"),
        ("first-start", "the first task starts from orthonormal rows too", "if self.task == 1:", "if self.task < 1:"),
        ("dependent-rows-zero", "dependent rows are zero at the start", 'deficient="random"', 'deficient="zero"'),
        ("start-from-merged", "a task starts from the merged B", "            A.copy_(basis.Q.mT)",
         "            A.copy_(basis.Q.mT)\n        for name, _, B in self.pairs():\n"
         '            B.copy_(self.kept[f"merged.{name}.lora_B"])'),
        ("lambda", "λ falls as 1/i", "1 / math.sqrt(self.task)", "1 / self.task"),
        ("lambda-counts-from-zero", "λ counts tasks from 0", "math.sqrt(self.task)",
         "math.sqrt(max(self.task - 1, 1))"),
        ("merged-A", "A is merged as B is", "A_m, B_m = A, B_m + self.merge_weight() * (B - B_m)",
         "A_m, B_m = A_m + self.merge_weight() * (A - A_m), B_m + self.merge_weight() * (B - B_m)"),
        ("merge-turned", "λ weighs the merged B", "B_m + self.merge_weight() * (B - B_m)",
         "B + self.merge_weight() * (B_m - B)"),
        ("merged-twice", "between tasks the last one is merged again", "            if self.in_task:\n",
         "            if self.task:\n"),
        ("tested-as-kept", "within a task the pair of the last one is tested", "            if self.in_task:\n",
         "            if self.in_task and not self.kept:\n"),
        ("tests-the-fine-tuned", "the fine-tuned pair is tested", "return self.merged()", "return {}"),
        ("kept-shares-memory", "what is kept is a view of what learns",
         "t.clone() for name, pair", "t for name, pair"),
        ("distance-of-B", "the distance leaves A out", '((B - merged[name]["lora_B"], A.mT), (B, A.mT))',
         '((B - merged[name]["lora_B"], torch.eye(A.shape[0])), (B, A.mT))'),
        ("drift-of-the-task", "the drift is relative to what the task leaves",
         "parts.append((both, (B, A.mT)))", 'parts.append((both, (pair["lora_B"], pair["lora_A"].mT)))'),
        ("drift-added", "the drift is the sum of both, not the change",
         'torch.cat([B, -pair["lora_B"]], 1)', 'torch.cat([B, pair["lora_B"]], 1)'),
        ("overlap-of-the-start", "the overlap is of what is kept with itself",
         "(A @ orthonormal_basis(self._before(name, A)[0].mT).Q)", "(A @ orthonormal_basis(A.mT).Q)"),
        ("rank-unchecked", "a rank above in_features is told when a task starts", "layer.r > layer.in_features",
         "layer.r > layer.out_features + layer.in_features"),
    ],
)  # fmt: skip
