"""Mutants of what runs in several processes."""

from .mutant import mutants_of

PARALLEL = [
    *mutants_of(
        "clora_kernels/integrations/parallel/tensor.py",
        "parallel",
        ("tests/test_integrations_parallel_tensor*.py",),
        [
            (
                "parts-unsummed",
                "of a gradient of what is whole each rank keeps its own part",
                "to_local(grad_placements=[Partial()])\n\n    def _seed",
                "to_local()\n\n    def _seed",
            ),
            (
                "dx-unsummed",
                "dx of a column-parallel layer is the part of one rank",
                "[Partial()] if self.INSIDE[0].is_replicate() else None",
                "None",
            ),
            (
                "bias-on-every-rank",
                "the bias of a row-parallel layer counts once for each rank",
                'if arguments["bias"] is not None and self.mesh.get_local_rank():',
                'if arguments["bias"] is not None and self.mesh.size() < 0:',
            ),
            (
                "seed-of-each-rank",
                "column-parallel ranks each keep their own draw",
                "return drawn.full_tensor()",
                "return drawn.to_local()",
            ),
            (
                "one-mask-for-all-parts",
                "row-parallel ranks drop the same elements of their parts",
                "self.mesh.get_local_rank() * _SEED_STEP",
                "0 * _SEED_STEP",
            ),
            (
                "seed-given-unread",
                "a row-parallel layer draws where a seed was given",
                "(draw_seed(x.device) if given is None else given) +",
                "draw_seed(x.device) +",
            ),
            (
                "Conv1D-cut-across",
                "a weight that is laid out another way is cut along the other features",
                "dim = 1 - dim",
                "dim = dim",
            ),
            (
                "indivisible-passes",
                "features that the ranks do not divide are not refused",
                "if features % ranks:",
                "if features < ranks:",
            ),
            (
                "x-of-another-size",
                "x that does not come as the plan says is not refused here",
                "if x.shape[-1] != expected:",
                "if not x.shape[-1]:",
            ),
        ],
    ),
    *mutants_of(
        "clora_kernels/integrations/parallel/gram_schmidt.py",
        "parallel-gs",
        ("tests/test_integrations_parallel_gram_schmidt.py",),
        [
            (
                "norm-of-some-rows",
                "columns are measured by the rows of one rank",
                "self.sum(super().norm(w).square()).sqrt()",
                "super().norm(w)",
            ),
            (
                "largest-summed",
                "where the largest is asked for the ranks' are summed",
                "self._reduced(t, dist.ReduceOp.MAX)",
                "self._reduced(t, dist.ReduceOp.AVG if t.is_cuda else dist.ReduceOp.MIN)",
            ),
            (
                "inner-of-some-rows",
                "backward takes the inner products of one rank's rows",
                "self.sum(aten.inner(left, right).double())",
                "aten.inner(left, right).double()",
            ),
            (
                "group-unread",
                "all ranks are summed, whatever the group",
                "dist.all_reduce(t, operation, self.group)",
                "dist.all_reduce(t, operation)",
            ),
            (
                "outside-the-group",
                "a rank that the group leaves out gets what its own rows give",
                "if dist.get_rank(group) < 0:",
                "if dist.get_rank(group) < -1:",
            ),
        ],
    ),
    *mutants_of(
        "clora_kernels/modules/adapter.py",
        "sharded",
        ("tests/test_integrations_parallel_sharded.py",),
        [
            (
                "merge-passes",
                "what is sharded is not refused where it would be merged",
                "            if is_sharded(t):\n",
                "            if t.is_meta:\n",
            ),
            (
                "unmerge-passes",
                "a whole weight takes the place of one that was sharded since the merge",
                '            self._check_whole({"weight": self.weight})\n',
                "            pass\n",
            ),
        ],
    ),
    *mutants_of(
        "clora_kernels/modules/sharded.py",
        "sharded",
        ("tests/test_integrations_parallel_sharded.py",),
        [
            (
                "whole-into-part",
                "a whole tensor is copied into a sharded one as it is",
                "if is_sharded(into) and not is_sharded(value):",
                "if into.is_meta:",
            ),
        ],
    ),
    *mutants_of(
        "clora_kernels/integrations/peft/routed_lora/model.py",
        "sharded",
        ("tests/test_integrations_parallel_peft.py",),
        [
            (
                "hand-over-of-a-part",
                "a rank adds the part of R that it has to R_old",
                "R_old += gathered(R)",
                "R_old += R",
            ),
        ],
    ),
    *mutants_of(
        "clora_kernels/integrations/peft/layers.py",
        "sharded",
        ("tests/test_integrations_parallel_peft.py",),
        [
            (
                "base-read-while-sharded",
                "the weight of a base layer that was sharded by itself is read without calling it",
                "if adapters and not args and not kwargs and why_not_fused(base) is None:",
                "if adapters and not args and not kwargs and isinstance(base, nn.Linear):",
            ),
            (
                "report-before-gathering",
                "the report says that a sharded layer is left alone",
                "is_plain(weight) or (gathered and is_sharded(weight))",
                "is_plain(weight)",
            ),
        ],
    ),
]
