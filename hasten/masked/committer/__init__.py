"""Which masked places are fixed after a pass."""
