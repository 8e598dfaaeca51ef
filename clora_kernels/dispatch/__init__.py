"""Which backend and strategy runs a call, and why: one readable function an operation; the operators that enter
torch."""
