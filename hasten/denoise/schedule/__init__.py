"""Which timesteps are walked."""
