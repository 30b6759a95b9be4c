"""Which branches of the guidance run."""
