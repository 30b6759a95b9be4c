"""Several next states of a text, checked in one pass."""
