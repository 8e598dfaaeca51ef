"""Continual-learning methods on the package's layers, the protocol they share, and the metrics to compare them by."""

from .checkpoint import SavedRun, load_run, save_run
from .clora import CLoRA
from .heads import CosineHead, Prototypes
from .lora import RoutedLoRAMethod, SequentialLoRA
from .losses import leading_left_singular_vectors, low_rank_norm, routing_orthogonality
from .metrics import TaskAccuracies, paired_gains, paired_table, summaries, summary, table
from .parity import assert_model_parity
from .plots import plot_accuracy_over_tasks, plot_forgetting_against_learning
from .protocol import ContinualMethod, TaskReport
from .run_directory import RunDirectory
from .vit import vit_targets

__all__ = [
    "CLoRA",
    "ContinualMethod",
    "CosineHead",
    "Prototypes",
    "RoutedLoRAMethod",
    "RunDirectory",
    "SavedRun",
    "SequentialLoRA",
    "TaskAccuracies",
    "TaskReport",
    "assert_model_parity",
    "leading_left_singular_vectors",
    "load_run",
    "low_rank_norm",
    "paired_gains",
    "paired_table",
    "plot_accuracy_over_tasks",
    "plot_forgetting_against_learning",
    "routing_orthogonality",
    "save_run",
    "summaries",
    "summary",
    "table",
    "vit_targets",
]
