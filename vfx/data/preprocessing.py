"""How an image becomes a network's input: the network's own way where timm, torchvision or its folder knows it.

Else the shorter side is resized (bilinear, antialiased) to 8/7 of the longer side wanted, the middle is cut out, and
values between 0 and 1 are standardised by ImageNet's means and deviations (those of its grey values for one channel).
``mean``, ``std`` and ``resize`` change that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfx.address import address
from vfx.errors import ArgumentError, DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's networks were trained
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
MARGIN = 8 / 7  # 256 to 224
_MODES = {1: "L", 3: "RGB"}

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, cut out the middle, standardise: an image becomes (channels, height, width)."""

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int  # of the shorter side
    bicubic: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        channels, height, width = self.shape
        image = image.convert(_MODES[channels])
        scale = self.resize / min(image.size)
        across, down = (self.resize if side == min(image.size) else int(side * scale) for side in image.size)
        image = image.resize((across, down), Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR)
        left, top = round((across - width) / 2), round((down - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image, np.uint8)).view(height, width, channels).movedim(-1, 0)
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (self.mean, self.std))
        return (pixels.contiguous().float() / 255 - mean) / std


def preprocessing(
    shape: Sequence[int],
    model: str = "",
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    resize: int | None = None,
) -> Transform:
    """The way from an image to ``shape`` (channels, height, width) for a model named as on the command line.

    ``mean`` and ``std``: one number, or one for each channel, of values between 0 and 1; ``resize``: pixels of the
    shorter side. Where one of them is given the model's own way is left. Raises ArgumentError, DataError.

    >>> to_input = preprocessing((3, 224, 224), "torchvision:resnet50")
    """
    if len(shape) != 3 or shape[0] not in _MODES:
        raise ArgumentError(f"images become inputs of (3, height, width) or (1, height, width), not {tuple(shape)}")
    channels, height, width = shape
    if mean is None and std is None and resize is None:
        transform = _own(model, (channels, height, width))
        if transform is not None:
            return transform
    grey = channels == 1
    return Preprocessing(
        (channels, height, width),
        _each("mean", (GREY_MEAN if grey else MEAN) if mean is None else mean, channels),
        _each("std", (GREY_STD if grey else STD) if std is None else std, channels),
        round(MARGIN * max(height, width)) if resize is None else max(resize, height, width),
    )


def _each(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = (float(value),) * channels if isinstance(value, (int, float)) else tuple(map(float, value))
    if len(values) != channels or (name == "std" and not all(values)):
        raise ArgumentError(f"{name}={value!r}: one number, or one for each of {channels} channels (std not 0)")
    return values


def _own(model: str, shape: tuple[int, int, int]) -> Transform | None:
    """What the library that a model comes from does, at this size; None where that is not known."""
    place = address(model)
    if place.name.startswith("torchvision") and shape[0] == 3:
        return _torchvision(place.where, shape)
    if place.name == "timm":
        return _timm(place.where, shape)
    if place.name == "hf":
        return _hugging_face(Path(place.where), shape)
    return None


def _torchvision(name: str, shape: tuple[int, int, int]) -> Transform | None:
    """The preset of the network's best weights; at another size than theirs it is scaled."""
    from torchvision.models import get_model_weights
    from torchvision.transforms import InterpolationMode

    try:
        preset = get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
        crop, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
    except (ValueError, AttributeError, TypeError):  # no such network, or none for images of one size
        return None
    bicubic = preset.interpolation is InterpolationMode.BICUBIC
    scaled = resize if shape[1:] == (crop, crop) else round(resize / crop * max(shape[1:]))
    return Preprocessing(shape, tuple(preset.mean), tuple(preset.std), scaled, bicubic)


def _timm(name: str, shape: tuple[int, int, int]) -> Transform | None:
    import timm
    from timm.data import create_transform, resolve_data_config

    config_of = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if config_of is None:
        return None
    config = resolve_data_config({"input_size": shape}, pretrained_cfg=config_of.to_dict())
    transform = create_transform(**config, is_training=False)
    return lambda image: transform(image.convert(_MODES[shape[0]]))


def _hugging_face(folder: Path, shape: tuple[int, int, int]) -> Transform | None:
    """Sizes, means and deviations of ``preprocessor_config.json``."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from error
    if config.get("do_normalize") is False:
        mean, std = (0.0,), (1.0,)
    else:
        mean, std = config.get("image_mean", (0.5,)), config.get("image_std", (0.5,))
    size: Any = config.get("size", {})
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    channels, longest = shape[0], max(shape[1:])
    each = [x if len(x) == channels else (sum(x) / len(x),) * channels for x in (mean, std)]
    bicubic = config.get("resample", 2) == Image.Resampling.BICUBIC
    return Preprocessing(shape, tuple(each[0]), tuple(each[1]), max(int(shortest or longest), longest), bicubic)
