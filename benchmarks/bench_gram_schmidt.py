"""Gram-Schmidt under pytest-benchmark.

    python -m pytest benchmarks/bench_gram_schmidt.py -k "quick and ours" --benchmark-json=out.json

run.py also alternates contestants and so is the better judge of their ratios; here each is timed by itself, to follow
one over time.
"""

from benching import benchmark_of
from gram_schmidt import OPERATION

test_forward_and_backward = benchmark_of(OPERATION)
