"""Gram-Schmidt on a GPU: nothing waits for it, and graphs replay on other matrices."""

import pytest
import torch

from clora_kernels import gram_schmidt, orthonormal_basis
from clora_kernels.testing import assert_orthonormal, hard_matrices, mixed_batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("beside", [False, True])
def test_nothing_synchronises(beside, no_syncs):
    """A batch of easy and hard matrices, forward and backward."""
    V, _ = mixed_batch(hard_matrices(300, 20, device="cuda"))
    P = orthonormal_basis(torch.randn(300, 5, device="cuda")).Q if beside else None
    V.requires_grad_()
    dR = torch.randn(20, 20, device="cuda")

    def step():
        result = gram_schmidt(V, P)
        return torch.autograd.grad((result.Q.nan_to_num().sin().sum() + (result.R.nan_to_num() * dR).sum()), V)

    step()
    with no_syncs():
        step()


@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_a_graph_replays_on_other_matrices(backend):
    """What was captured with easy matrices deflates hard ones: no decision of the host is in the graph."""
    hard, zoo = mixed_batch(hard_matrices(90, 12, device="cuda"))
    V = torch.randn_like(hard)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in (V, hard):  # whatever either needs is loaded before the capture
            gram_schmidt(batch, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gram_schmidt(V, backend=backend)
    for batch, ranks in ((V.clone(), None), (hard, [m.rank for m in zoo])):
        V.copy_(batch)
        graph.replay()
        assert_orthonormal(result, V, ranks=ranks)
