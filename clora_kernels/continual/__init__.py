"""Continual-learning methods on the package's layers, the protocol they share, and the metrics to compare them by."""

from .checkpoint import SavedRun, load_run, save_run
from .cl_lora import CLLoRA
from .clora import CLoRA
from .dac import DAC
from .dac_layer import DACLinear
from .heads import CosineHead, Prototypes
from .lora import RoutedLoRAMethod, SequentialLoRA
from .losses import (
    ago,
    block_weight_penalty,
    check_weight,
    leading_left_singular_vectors,
    low_rank_norm,
    pairwise_overlap,
    routing_orthogonality,
    soft_cross_entropy,
)
from .metrics import TaskAccuracies, paired_gains, paired_table, summaries, summary, table
from .parity import assert_model_parity
from .plots import plot_accuracy_over_tasks, plot_forgetting_against_learning
from .protocol import ContinualMethod, TaskReport
from .run_directory import RunDirectory
from .slao import SLAO
from .vit import class_token_exit, vit_targets

__all__ = [
    "DAC",
    "SLAO",
    "CLLoRA",
    "CLoRA",
    "ContinualMethod",
    "CosineHead",
    "DACLinear",
    "Prototypes",
    "RoutedLoRAMethod",
    "RunDirectory",
    "SavedRun",
    "SequentialLoRA",
    "TaskAccuracies",
    "TaskReport",
    "ago",
    "assert_model_parity",
    "block_weight_penalty",
    "check_weight",
    "class_token_exit",
    "leading_left_singular_vectors",
    "load_run",
    "low_rank_norm",
    "paired_gains",
    "paired_table",
    "pairwise_overlap",
    "plot_accuracy_over_tasks",
    "plot_forgetting_against_learning",
    "routing_orthogonality",
    "save_run",
    "soft_cross_entropy",
    "summaries",
    "summary",
    "table",
    "vit_targets",
]
