"""How Gram-Schmidt is computed: ``algebra`` is the algorithm, written once over a few primitives; ``aten`` brings them
as ATen matmuls, ``triton`` as kernels, ``layer`` the whole of it as one compiled call on the CPU."""
