"""The mutants, by the part of the code that they break."""

from .aot import AOT
from .cl_lora import CL_LORA
from .continual import CONTINUAL
from .cpu_matmul import CPU_MATMUL
from .dac import DAC
from .digits import DIGITS
from .dropout_mask import DROPOUT_MASK
from .examples import EXAMPLES
from .extension import EXTENSION
from .forward_mode import FORWARD_MODE
from .gram_schmidt_algebra import ALGEBRA as GS_ALGEBRA
from .gram_schmidt_calls import CALLS as GS_CALLS
from .gram_schmidt_native import NATIVE as GS_NATIVE
from .gram_schmidt_panels import PANELS as GS_PANELS
from .gram_schmidt_triton import TRITON as GS_TRITON
from .indices import INDICES
from .inject import INJECT
from .integrations import INTEGRATIONS
from .launch import LAUNCH
from .mutant import Mutant
from .parallel import PARALLEL
from .peft_accelerate import ACCELERATE
from .peft_method import PEFT_METHOD
from .rank1_experts import EXPERTS
from .rank1_experts_calls import CALLS as EXPERT_CALLS
from .rank1_experts_cuda import CUDA as EXPERTS_CUDA
from .rank1_experts_modules import EXPERT_MODULES
from .rank1_experts_native import NATIVE as EXPERTS_NATIVE
from .report import REPORT
from .routed_lora_algebra import ALGEBRA
from .routed_lora_arguments import ARGUMENTS
from .routed_lora_aten import ATEN
from .routed_lora_autograd import AUTOGRAD
from .routed_lora_banks import BANKS
from .routed_lora_composite import COMPOSITE
from .routed_lora_dispatch import DISPATCH
from .routed_lora_eager import EAGER
from .routed_lora_modules import MODULES
from .routed_lora_native import NATIVE
from .routed_lora_needs import NEEDS
from .routed_lora_pack import PACK
from .routed_lora_tables import TABLES
from .routed_lora_triton_big import TRITON_BIG
from .routed_lora_triton_common import TRITON_COMMON
from .routed_lora_triton_linear import TRITON_LINEAR
from .routed_lora_triton_small import TRITON_SMALL
from .routed_lora_tune import TUNE
from .run_config import RUN_CONFIG
from .run_directory import RUN_DIRECTORY
from .slao import SLAO
from .trainer import TRAINER
from .views import VIEWS

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: list[Mutant] = [
    *ALGEBRA,
    *NEEDS,
    *BANKS,
    *PACK,
    *ATEN,
    *CPU_MATMUL,
    *VIEWS,
    *DISPATCH,
    *COMPOSITE,
    *INDICES,
    *AUTOGRAD,
    *EAGER,
    *ARGUMENTS,
    *MODULES,
    *INJECT,
    *REPORT,
    *NATIVE,
    *TABLES,
    *TUNE,
    *GS_ALGEBRA,
    *GS_CALLS,
    *GS_NATIVE,
    *GS_PANELS,
    *GS_TRITON,
    *EXPERTS,
    *EXPERTS_NATIVE,
    *EXPERTS_CUDA,
    *EXPERT_CALLS,
    *EXPERT_MODULES,
    *TRITON_SMALL,
    *TRITON_BIG,
    *TRITON_LINEAR,
    *TRITON_COMMON,
    *LAUNCH,
    *AOT,
    *INTEGRATIONS,
    *ACCELERATE,
    *PEFT_METHOD,
    *DROPOUT_MASK,
    *EXTENSION,
    *FORWARD_MODE,
    *CONTINUAL,
    *SLAO,
    *CL_LORA,
    *TRAINER,
    *DAC,
    *RUN_DIRECTORY,
    *RUN_CONFIG,
    *DIGITS,
    *EXAMPLES,
    *PARALLEL,
]
