"""Rank-1 experts under pytest-benchmark.

    python -m pytest benchmarks/bench_rank1_experts.py -k "quick and ours" --benchmark-json=out.json

run.py also alternates contestants and so is the better judge of their ratios; here each is timed by itself, to follow
one over time.
"""

from benching import benchmark_of
from rank1_experts import OPERATION

test_forward_and_backward = benchmark_of(OPERATION)
