"""What the three picture models have in common while they learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from hasten.training.loop import Settings
from hasten.zoo.denoisers.data import Batch


class Denoiser(nn.Module):
    """A text encoder and a denoising network, trained together on the codes of an autoencoder.

    Attributes:
        text_encoder, network: what learns.
        frozen: holds the autoencoder, in a list so that it is no part of what learns.
    """

    hidden_kinds: tuple[str, ...] = ("attn", "ff", "mlp")  # modules whose matrices Muon updates

    def __init__(
        self,
        text_encoder: nn.Module,
        network: Any,
        autoencoder: Any,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.network = network
        self.frozen = [autoencoder.eval().requires_grad_(False)]
        self.tokenizer = tokenizer

    @property
    def autoencoder(self) -> Any:
        return self.frozen[0]

    def loss(self, batch: Batch) -> Tensor:
        """The mean squared error of what the network predicts, a scalar."""
        raise NotImplementedError

    def pipeline(self) -> Any:
        """The parts as they are now, as a pipeline of Diffusers."""
        raise NotImplementedError

    def text(self, captions: tuple[str, ...]) -> Tensor:
        """Embeddings (rows, words, channels) of captions, as the pipeline makes them."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Latents of pictures, scaled to unit variance."""
        latents = self.autoencoder.encode(pictures).latent_dist.mode()
        return latents.float() * self.autoencoder.config.scaling_factor


def denoiser_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """`loss_fn` of `training.loop.fit`."""
    assert isinstance(model, Denoiser)
    with plain_attention():
        return model.loss(batch), {}


def noise_levels(rows: int, shift: float = 1.0) -> Tensor:
    """Noise levels (rows,) between 0 and 1: one from each of equal parts, which calms the loss.

    Args:
        shift: above 1 for more of the high levels, at which a picture's layout is decided.
    """
    even = (torch.randperm(rows) + torch.rand(rows)) / rows
    return shift * even / (1 + (shift - 1) * even)


def denoiser_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward parts, AdamW for everything else."""
    assert isinstance(model, Denoiser)
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and any(kind in name for kind in model.hidden_kinds)
        (hidden if inner else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest, lr=settings.other_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
    ]
    if hidden:
        optimizers.insert(
            0, torch.optim.Muon(hidden, lr=settings.matrix_lr, weight_decay=settings.matrix_decay)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as two matrix products in bf16.

    For short sequences on a processor with bf16 matrix units this takes a third of the time of
    the fused kernel, whose backward pass is slow.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
