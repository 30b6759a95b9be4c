"""A sample in another size: how it is resized, and what of a network call depends on the size."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.denoise.layout import Layout
from hasten.denoise.network import Call, networks
from hasten.denoise.state.tokens import has_frames_first
from hasten.errors import SubjectError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Size:
    """The size of a sample, and how its values lie.

    Attributes:
        grid: (frames, height, width) in units that cannot be split: tokens, or the cells of a
            U-Net's deepest level.
        unit: (height, width) values of a unit in the sample, where it is not packed into tokens.
        packed: side of the square of values that one token of a packed sample holds; 0 where the
            sample is not packed.
    """

    grid: Grid
    unit: tuple[int, int]
    packed: int = 0

    def scaled(self, scale: float) -> Size:
        """The size with so many times the height and width, at least one unit each."""
        frames, height, width = self.grid
        smaller = (frames, max(1, round(height * scale)), max(1, round(width * scale)))
        return Size(smaller, self.unit, self.packed)

    def shape(self, like: Tensor) -> tuple[int, ...]:
        """The shape of a sample of this size, with the rows and channels of another."""
        frames, height, width = self.grid
        if self.packed:
            return (len(like), frames * height * width, like.shape[-1])
        return (*like.shape[:-2], height * self.unit[0], width * self.unit[1])


def size_of(call: Call, pipe: Any, who: str) -> Size:
    """The size of a network call's sample; `who` is the technique that errors speak of.

    Raises:
        SubjectError: where it cannot be told.
    """
    x = call.x
    if x.ndim in (4, 5):
        patches = Layout.of(call).patch
        patch = patches[1:]
        if not _cuts_patches(call.module):
            config: Any = call.module.config
            deepest = 2 ** (len(config.get("block_out_channels", (1,))) - 1)
            patch = (deepest, deepest)
        frames = 1
        if x.ndim == 5:
            frames = x.shape[1 if has_frames_first(x, call.module) else 2] // patches[0]
        units = (x.shape[-2] // patch[0], x.shape[-1] // patch[1])
        return Size((frames, *units), (patch[0], patch[1]))
    grid = Layout.of(call).grid(x.shape[1]) if x.ndim == 3 else None
    if grid is None:
        raise SubjectError(
            f"{who}: {type(pipe).__name__} does not say how its sample's {x.shape[1]} tokens lie, so it cannot be resized."
        )
    return Size(grid, (1, 1), _side(x.shape[-1], pipe, who))


def _cuts_patches(module: nn.Module) -> bool:
    config: Any = module.config
    return "patch_size" in config or "all_patch_size" in config


def _side(values: int, pipe: Any, who: str) -> int:
    """Side of the square that a token of so many values was cut from."""
    config = pipe.vae.config
    channels = config.get("latent_channels") or config.get("z_dim") or values
    side = math.isqrt(max(1, values // channels))
    if side * side * channels != values:
        raise SubjectError(
            f"{who}: a token of {type(pipe).__name__} holds {values} values of {channels} channels, which is no square, "
            "so its sample cannot be resized."
        )
    return side


def resize(x: Tensor, old: Size, new: Size) -> Tensor:
    """A sample resized: pixels are averaged on the way down, and drawn smoothly on the way up.

    Args:
        x: (rows, ...) in the layout of the pipeline.
    """
    if old.grid == new.grid:
        return x
    planes = _planes(x, old)
    height, width = (n * u for n, u in zip(new.grid[1:], _unit(new), strict=True))
    shrinks = height < planes.shape[-2]
    made = F.interpolate(
        planes.float(),
        size=(height, width),
        mode="bilinear" if shrinks else "bicubic",
        antialias=shrinks,
    )
    return _packed(made, x, new).to(x.dtype)


def _unit(size: Size) -> tuple[int, int]:
    return (size.packed, size.packed) if size.packed else size.unit


def _planes(x: Tensor, size: Size) -> Tensor:
    """(planes, channels, height, width) of a sample."""
    if not size.packed:
        return x.reshape(-1, 1, *x.shape[-2:])
    f, h, w = size.grid
    side = size.packed
    cut = x.reshape(len(x) * f, h, w, -1, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(cut), -1, h * side, w * side)


def _packed(planes: Tensor, like: Tensor, size: Size) -> Tensor:
    if not size.packed:
        return planes.reshape(size.shape(like))
    _, h, w = size.grid
    side = size.packed
    cut = planes.reshape(len(planes), -1, h, side, w, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(size.shape(like))


def fit(call: Call, full: Size, now: Size) -> None:
    """Make the arguments of a call fit a sample that is smaller than the pipeline believes.

    Positions are those that the network would have at the smaller size: the first rows and columns.
    """
    given = call.kwargs
    frames, height, width = full.grid
    count = frames * height * width
    text = given.get("encoder_hidden_states")
    for name, value in given.items():
        if "mask" in name and isinstance(value, Tensor) and isinstance(text, Tensor):
            given[name] = _fewer(value, text.shape[1], count, math.prod(now.grid))
        if name in ("img_ids", "timestep", "t") or "rotary" in name:
            given[name] = _first_places(name, value, full, now, count)
    if isinstance(given.get("height"), int):
        given["height"] = given["height"] * now.grid[1] // height
        given["width"] = given["width"] * now.grid[2] // width
    if given.get("img_shapes"):
        given["img_shapes"] = [
            [now.grid] if isinstance(entry, list) else now.grid for entry in given["img_shapes"]
        ]


def _first_places(name: str, value: Any, full: Size, now: Size, count: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_first_places(name, entry, full, now, count) for entry in value)
    if not isinstance(value, Tensor):
        return value
    axis = next((i for i in range(value.ndim) if value.shape[i] == count and value.ndim > 1), None)
    if axis is None or (name in ("timestep", "t") and axis != 1):
        return value
    shape, (_, rows, columns) = value.shape, now.grid
    cut = value.reshape(*shape[:axis], *full.grid, *shape[axis + 1 :])
    cut = cut.narrow(axis + 1, 0, rows).narrow(axis + 2, 0, columns)
    return cut.reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _fewer(mask: Tensor, text: int, count: int, now: int) -> Tensor:
    """A mask over text and sample for fewer of the sample's tokens, none of which is ever masked."""
    if mask.ndim != 2 or mask.shape[1] != text + count:
        return mask
    keep = text + now
    return mask[:, :keep] if bool(mask[:, text:].bool().all()) else mask[:, -keep:]


# Arguments of calls in whose loop something else has the sample's size: pictures, what becomes of
# parts of a panorama, what an edit adds.
_OF_ITS_SIZE = ("mask_image", "control_image", "view_batch_size", "editing_prompt")


def check_sizes(technique: str, pipe: Any) -> None:
    """Raise a SubjectError for a pipeline in whose loop something else has the sample's size."""
    kind = type(pipe).__name__
    taken = inspect.signature(type(pipe).__call__).parameters
    if set(_OF_ITS_SIZE) & set(taken) or getattr(pipe, "controlnet", None):
        raise SubjectError(
            f"{kind} puts pictures of the sample's size into its loop, so {technique}, which changes that size on "
            "the way, cannot run on it."
        )
    check_alone(technique, pipe)


def check_alone(technique: str, pipe: Any) -> None:
    """Raise a SubjectError for a pipeline whose network is given pictures beside the sample."""
    kind = type(pipe).__name__
    for module in networks(pipe):
        config: Any = module.config
        inputs, outputs = config.get("in_channels"), config.get("out_channels")
        if hasattr(pipe, "_pack_latents") and isinstance(outputs, int):
            outputs *= int(config.get("patch_size") or 1) ** 2
        if isinstance(inputs, int) and isinstance(outputs, int) and inputs > outputs:
            raise SubjectError(
                f"{type(module).__name__} of {kind} reads {inputs} channels and puts out {outputs}: it is given "
                f"pictures beside the sample, so {technique}, which puts another sample in its place, cannot run."
            )


def check_whole(technique: str, pipe: Any, call: Call, sample: Tensor) -> None:
    """Raise a SubjectError where the scheduler moves something else than what the network is given.

    Some clips that begin with a given picture keep its frame; some have frames for rows in one of both.
    """
    if sample[0].numel() != call.x[0].numel():
        raise SubjectError(
            f"{type(pipe).__name__} gives its network {tuple(call.x.shape)} and its scheduler {tuple(sample.shape)}, "
            f"and {technique} takes pipelines where both are one sample."
        )


def fresh(like: Tensor, generator: Any) -> Tensor:
    """Gaussian noise in float32, from the generators of the pipeline's call."""
    from diffusers.utils.torch_utils import randn_tensor

    if isinstance(generator, list) and len(generator) != len(like):
        generator = generator[0]  # a pipeline that keeps each sample twice
    noise: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=torch.float32
    )
    return noise


def unpacked_latents(x: Tensor, size: Size | None) -> Tensor:
    """(rows, channels, height, width) of a sample that is packed into tokens."""
    assert size is not None and size.grid[0] == 1
    return _planes(x, size)


def packed_latents(planes: Tensor, size: Size | None) -> Tensor:
    """The inverse: (rows, tokens, values)."""
    assert size is not None and size.grid[0] == 1
    values = planes.shape[1] * size.packed**2
    return _packed(planes, planes.new_empty(len(planes), 1, values), size)
