"""The engine for masked-diffusion language models, which fill masked positions in any order."""
