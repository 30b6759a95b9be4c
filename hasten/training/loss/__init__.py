"""Techniques that add a term to the objective, one file each."""
