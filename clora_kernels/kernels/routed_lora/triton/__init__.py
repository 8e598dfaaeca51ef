"""The primitives of routed LoRA as Triton kernels: CUDA devices of compute capability 8.0 and above, fp32, bf16, fp16.

One file a primitive; ``common`` holds what kernels and launchers share, ``tiles`` the sizes they run with. Under
``TRITON_INTERPRET=1`` the same kernels run on the CPU, slowly: for proof, not for use.
"""

from .linear import linear
from .pack import pack
from .reduce import reduce
from .shrink import shrink
from .unpack import unpack

__all__ = ["linear", "pack", "reduce", "shrink", "unpack"]
