"""Rank-1 experts as a drop-in layer, and how its experts are chosen."""

from .layer import Rank1ExpertLinear
from .product_keys import ProductKeyScores

__all__ = ["ProductKeyScores", "Rank1ExpertLinear"]
