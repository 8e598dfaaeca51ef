"""The training step of the continual-learning methods under pytest-benchmark.

    python -m pytest benchmarks/bench_continual.py -k "quick and ours" --benchmark-json=out.json

run.py also alternates contestants and so is the better judge of their ratios; here each is timed by itself, to follow
one over time.
"""

from benching import benchmark_of
from continual import OPERATION

test_forward_and_backward = benchmark_of(OPERATION)
