"""How routed LoRA is computed: ``algebra`` is the algorithm, written once; ``aten`` its three primitives on ATen
matmuls."""
