"""Characters <-> token ids. No torch."""
