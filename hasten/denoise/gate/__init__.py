"""Which network calls run, and what stands for those that do not."""
