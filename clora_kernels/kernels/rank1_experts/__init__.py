"""Rank-1 experts: the algorithm over three primitives, and those primitives on ATen and in compiled code."""
