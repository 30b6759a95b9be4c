"""scenes-dit: a flow-matching transformer that draws captions, as a CogView4 pipeline.

CogView4 was chosen among the transformer pipelines of Diffusers because its text is padded to 16
tokens only, its rotary positions stretch over the picture whatever its size, its two guidance
branches are calls of their own, and Diffusers' caches know its blocks.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GlmConfig, GlmModel

from hasten.zoo.denoisers.base import Denoiser, noise_levels
from hasten.zoo.denoisers.data import NUM_LOOKS, Batch, looks_of
from hasten.zoo.denoisers.words import PAD, VOCABULARY, word_tokenizer

WORDS = 16  # tokens that every caption is padded to
SHIFT = 1.5  # of the noise levels in training
SPARSE_SHARE = 0.2  # of full-size batches, on which tokens are left out
FEWEST_TOKENS = 0.35  # share of tokens that is kept then, at least
LOOKS_WEIGHT = 0.2  # of naming what stands at each token, beside the squared error


class SceneDiT(Denoiser):
    """The network predicts noise minus picture from (1 - s) picture + s noise, at time 1000 s.

    On a share of the batches it sees some of the tokens only, at their own positions, so that
    methods that compute few tokens of early steps have a model that can do without the others.

    Half-way through its blocks it also has to name what will stand at each token, in each of the
    colours, shapes and fills. That tells it directly what the squared error of flat shapes hardly
    says, and learning to draw shapes takes a fraction of the pictures. The layer that names is
    thrown away after training. The idea is that of representation alignment (REPA,
    arXiv 2410.06940), with the scene itself in the place of another network's features.
    """

    def __init__(
        self, autoencoder: Any, *, width: int, layers: int, heads: int, cells: int, words_dim: int
    ) -> None:
        from diffusers import CogView4Transformer2DModel

        channels = autoencoder.config.latent_channels
        network: Any = CogView4Transformer2DModel(
            patch_size=1,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            attention_head_dim=width // heads,
            num_attention_heads=heads,
            text_embed_dim=words_dim,
            time_embed_dim=width // 2,
            condition_dim=16,
            sample_size=cells,
            rope_axes_dim=(cells, cells),
        )
        _start_modulation(network)
        super().__init__(
            GlmModel(_glm_config(words_dim)),
            network,
            autoencoder,
            word_tokenizer(start=True, end=False, padding_side="left", max_length=WORDS),
        )
        self.names = nn.Linear(width, NUM_LOOKS + 1)
        self._seen: list[Tensor] = []  # the states of the picture's tokens, half-way
        network.transformer_blocks[layers // 2 - 1].register_forward_hook(self._look)

    def _look(self, _: nn.Module, __: object, output: tuple[Tensor, Tensor]) -> None:
        self._seen[:] = [output[0]] if self.training else []

    def text(self, captions: tuple[str, ...]) -> Tensor:
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=WORDS, return_tensors="pt"
        )["input_ids"]
        states = self.text_encoder(
            ids.to(self.text_encoder.device), output_hidden_states=True, use_cache=False
        ).hidden_states
        embeddings: Tensor = states[-2]
        return embeddings

    def loss(self, batch: Batch) -> Tensor:
        latents = self.encode(batch.pictures)
        level = noise_levels(len(latents), SHIFT).to(latents.device)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, level[:, None, None, None])
        target = noise - latents
        looks = looks_of(batch.scenes, latents.shape[-1]).flatten(1).to(latents.device)
        positions = None
        full = latents.shape[-1] == self.network.config.sample_size
        if full and random.Random(torch.randint(1 << 30, ()).item()).random() < SPARSE_SHARE:
            positions = self.network.rope(latents)
            noisy, target, positions, kept = _fewer_tokens(noisy, target, positions)
            looks = looks[:, kept]
        size = torch.full((len(latents), 2), float(batch.pictures.shape[-1]))
        predicted = self.network(
            noisy,
            self.text(batch.captions),
            1000 * level,
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            image_rotary_emb=positions,
            return_dict=False,
        )[0]
        loss = (predicted.float() - target).square().mean()
        named = self.names(self._seen.pop()).float()
        return loss + LOOKS_WEIGHT * cross_entropy(named.flatten(0, 1), looks.flatten())

    def pipeline(self) -> Any:
        from diffusers import CogView4Pipeline, FlowMatchEulerDiscreteScheduler

        return CogView4Pipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.autoencoder,
            transformer=self.network,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )


def _fewer_tokens(
    noisy: Tensor, target: Tensor, positions: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """The same random tokens of all rows, laid out as a picture that is one token wide."""
    count = noisy.shape[-2] * noisy.shape[-1]
    share = FEWEST_TOKENS + (1 - FEWEST_TOKENS) * torch.rand(()).item()
    kept = torch.randperm(count)[: int(count * share)].sort().values
    cosine, sine = positions
    return (
        noisy.flatten(2)[:, :, kept, None],
        target.flatten(2)[:, :, kept, None],
        (cosine[kept], sine[kept]),
        kept,
    )


def _glm_config(dim: int) -> GlmConfig:
    # The pipeline reads the states before the last layer, so two of the three layers work.
    return GlmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=3,
        num_attention_heads=dim // 32,
        num_key_value_heads=dim // 32,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=VOCABULARY.index(PAD),
        attention_bias=False,
    )


def _start_modulation(network: Any) -> None:
    """Begin with blocks that do not depend on time and an output of 0; both are learnt quickly."""
    for block in network.transformer_blocks:
        linear = block.norm1.linear
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        with torch.no_grad():
            # 12 equal parts; numbers 4, 5, 10 and 11 are the gates.
            linear.bias.unflatten(0, (12, -1))[[4, 5, 10, 11]] = 0.5
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
