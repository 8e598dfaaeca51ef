"""How every operation is computed."""
