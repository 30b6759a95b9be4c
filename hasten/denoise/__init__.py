"""The engine for diffusion and flow models, on the pipelines of the Diffusers library."""
