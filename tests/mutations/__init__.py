"""The mutants, by the part of the code that they break."""

from .continual import CONTINUAL
from .dropout_mask import DROPOUT_MASK
from .mutant import Mutant
from .routed_lora_algebra import ALGEBRA
from .routed_lora_arguments import ARGUMENTS
from .routed_lora_aten import ATEN
from .routed_lora_autograd import AUTOGRAD
from .routed_lora_dispatch import DISPATCH
from .routed_lora_modules import MODULES

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: list[Mutant] = [*ALGEBRA, *ATEN, *DISPATCH, *AUTOGRAD, *ARGUMENTS, *MODULES, *DROPOUT_MASK, *CONTINUAL]
