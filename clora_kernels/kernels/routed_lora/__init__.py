"""How routed LoRA is computed: ``algebra`` is the algorithm, written once; ``aten`` its four primitives on ATen
matmuls."""
