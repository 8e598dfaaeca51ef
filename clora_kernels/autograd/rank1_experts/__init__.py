"""The public functions of rank-1 experts."""

from .functions import gather_rank1_experts, rank1_experts
from .merge import merge_rank1_experts

__all__ = ["gather_rank1_experts", "merge_rank1_experts", "rank1_experts"]
