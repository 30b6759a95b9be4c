"""Which fixed places are opened again."""
