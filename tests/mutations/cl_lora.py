"""Mutants of CL-LoRA, of its losses and of the models made of blocks that it works on."""

from .mutant import mutants_of

_EQUATIONS = "tests/test_continual_cl_lora_equations.py"
_METHOD = "tests/test_continual_cl_lora.py"
_VIEWS = "tests/test_continual_cl_lora_views.py"

CL_LORA = mutants_of(
    "clora_kernels/continual/cl_lora.py",
    "cl-lora",
    (_EQUATIONS, _METHOD, _VIEWS),
    [
        ("half-rounded-up", "of an odd number of blocks the larger half is shared",
         "blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]",
         "blocks[: -(-len(blocks) // 2)], blocks[-(-len(blocks) // 2) :]"),
        ("draw-from-minus-one", "the matrix that is orthonormalised is not of U[0, 1)",
         "gram_schmidt(torch.rand_like(layer.lora_A.mT))", "gram_schmidt(torch.randn_like(layer.lora_A.mT))"),
        ("not-orthonormal", "A is drawn and not orthonormalised",
         "gram_schmidt(torch.rand_like(layer.lora_A.mT)).Q.mT", "torch.rand_like(layer.lora_A)"),
        ("up-kept", "the specific B go on from the task before", "        layer.lora_B.zero_()\n", ""),
        ("scaling-kept", "the block weights go on from the task before",
         "            layer.scaling.uniform_(0.5, 1.5)", "            layer.scaling.requires_grad_()"),
        ("idle-kept", "the idle weights go on from the task before",
         "            idle.uniform_(0.5, 1.5)", "            idle.clamp_(0.5, 1.5)"),
        ("shared-down-learns", "the shared A learn",
         "(layer.lora_B for layer in self.shared.values())",
         "(p for layer in self.shared.values() for p in layer.adapter_parameters())"),
        ("teacher-is-student", "the teacher holds the shared B of the student",
         "with torch.no_grad(), self.with_adapters(self.teacher()):", "with torch.no_grad():"),
        ("teacher-detached", "the head gets no gradient through the teacher",
         "self.head(features), self.temperature)", "self.head(features).detach(), self.temperature)"),
        ("branches-exchanged", "the teacher learns from the student",
         "soft_cross_entropy(student, self.head(features), self.temperature)",
         "soft_cross_entropy(self.head(features), student, self.temperature)"),
        ("columns-weighed", "gradients are weighed by the lengths of columns",
         "torch.linalg.vector_norm(old, dim=1)", "torch.linalg.vector_norm(old, dim=0)"),
        ("weights-of-sum-one", "row weights add up to one",
         "len(norms) * norms / total", "norms / total"),
        ("zero-over-zero", "a teacher of zeros makes NaN",
         "torch.where(total > 0, len(norms) * norms / total, torch.ones_like(norms))", "len(norms) * norms / total"),
        ("task-step-weighed", "the task's gradients are weighed too", 'if step == "task":', 'if step == "none":'),
        ("idle-without-decay", "idle weights do not decay where the penalty does not reach them",
         "torch.zeros_like(idle) if idle.grad is None else idle.grad", "idle.grad"),
        ("idle-outside-the-cosine", "idle weights are not in the cosine",
         "for w in (*weights, *(p.flatten() for p in self.own.values()))", "for w in weights"),
        ("last-task-alone", "block weights keep away from the last task's alone",
         ".to(here) for i in range(1, self.task)]", ".to(here) for i in range(self.task - 1, self.task)]"),
        ("old-weights-elsewhere", "old block weights stay in their dtype and on their device",
         '.block_weights"].to(here) for', '.block_weights"] for'),
        ("teacher-by-reference", "the teacher's B go on learning",
         'self.kept[f"teacher.{name}.lora_B"] = layer.lora_B.detach().clone()',
         'self.kept[f"teacher.{name}.lora_B"] = layer.lora_B.detach()'),
        ("live-in-every-view", "every view has the block weights of the last task",
         '                "scaling": weights[i],\n', ""),
        ("kept-by-reference", "what is kept of a task is drawn anew with the next",
         'self.kept[f"task.{self.task}.{name}.lora_A"] = layer.lora_A.detach().clone()',
         'self.kept[f"task.{self.task}.{name}.lora_A"] = layer.lora_A.detach()'),
        ("computed-every-time", "every view computes the shared blocks",
         "for block in self.shared_blocks]):\n", "for block in self.shared_blocks[:0]]):\n"),
        ("headless", "a head that is missing is not told before the batch runs",
         "if self.head is None:", "if self.head is self:"),
    ],
)  # fmt: skip
CL_LORA += mutants_of(
    "clora_kernels/continual/blocks.py",
    "blocks",
    ("tests/test_continual_blocks.py", _VIEWS),
    [
        ("order-of-names", "blocks are sorted by name, 10 before 2",
         "return [found[place] for place in sorted(found)]", "return sorted(found.values())"),
        ("tied-untold", "a layer that stands in two blocks is not told", "!= block:\n", "is None:\n"),
        ("several-lists-untold", "layers of several lists are not told", "if len(several) > 1:", "if not several:"),
        ("hook-left", "the hook that ends a forward stays",
         "    finally:\n        handle.remove()\n    if not", "    if not"),
        ("same-tensor", "a model that changes what a block put out changes it for every run",
         "return copy.deepcopy(self.given[self.calls - 1])", "return self.given[self.calls - 1]"),
        ("not-rewound", "a second run computes again", "            once.calls = 0", "            once.calls += 0"),
        ("patch-lost", "a forward that was patched before is lost",
         '            block.__dict__.update({"forward": patched[block]} if block in patched else {})\n', ""),
    ],
)  # fmt: skip
CL_LORA += mutants_of(
    "clora_kernels/continual/losses.py",
    "losses",
    ("tests/test_continual_losses.py",),
    [
        ("targets-not-softened", "the targets are taken at temperature 1",
         "F.softmax(target_logits / temperature, -1)", "F.softmax(target_logits, -1)"),
        ("temperature-squared", "soft cross-entropy is multiplied by the squared temperature",
         ".sum(-1).mean()", ".sum(-1).mean() * temperature**2"),
        ("entropy-over-classes", "a mean over classes in place of the sum", ".sum(-1).mean()", ".mean()"),
        ("signed-cosine", "block weights may turn away from the old ones",
         "F.cosine_similarity(weights, old, dim=-1).abs().mean()", "F.cosine_similarity(weights, old, dim=-1).mean()"),
        ("cosines-added", "the penalty grows with the number of tasks",
         "dim=-1).abs().mean()", "dim=-1).abs().sum()"),
    ],
)  # fmt: skip
CL_LORA += mutants_of(
    "clora_kernels/continual/vit.py",
    "vit",
    ("tests/test_continual_blocks.py",),
    [
        ("norm-of-a-block", "the exit takes a norm within the blocks", " and not n.startswith(blocks)", ""),
        ("first-norm", "the exit takes the first norm outside of the blocks", "norms[-1](hidden", "norms[0](hidden"),
        ("last-token", "the exit takes the last token", "hidden[:, 0]", "hidden[:, -1]"),
    ],
)  # fmt: skip
CL_LORA += mutants_of(
    "clora_kernels/continual/cl_lora.py",
    "cl-lora",
    ("tests/test_continual_cl_lora.py",),
    [
        ("reassignment-of-any-type", "a text is a yes", "if not isinstance(reassignment, bool):",
         "if reassignment is None:"),
        ("exit-uncalled", "an exit that cannot be called is taken", "if not callable(exit):", "if exit is None:"),
    ],
)  # fmt: skip
