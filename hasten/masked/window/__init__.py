"""Which positions a pass computes; the others keep their keys and values."""
