"""The steps of PEFT models under pytest-benchmark.

    python -m pytest benchmarks/bench_peft.py -k "quick and ours" --benchmark-json=out.json

run.py also alternates contestants and so is the better judge of their ratios; here each is timed by itself, to follow
one over time.
"""

from benching import benchmark_of
from peft_steps import OPERATION

test_forward_and_backward = benchmark_of(OPERATION)
