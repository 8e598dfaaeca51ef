"""How routed LoRA is computed: ``algebra`` is the algorithm, written once over five primitives; ``aten`` brings them as
ATen matmuls, ``triton`` as fused kernels."""
