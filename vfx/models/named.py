"""Models by name: the constructors of torchvision, timm, vfx and the user's own code, and local Hugging Face folders.

Networks are built without weights, and nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vfx.address import Address, address
from vfx.errors import ArgumentError
from vfx.extras import extra_of, missing
from vfx.imports import is_code, load_object
from vfx.models import MODELS


class Family(NamedTuple):
    build: Callable[[str, Mapping[str, Any]], Any]  # of the name behind the colon and the options
    inputs: Callable[[str], list[str]]  # what the network takes, as --input describes it
    summary: str


def build(model: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that ``model`` names, in evaluation mode; ``options`` go to its constructor.

    ``torchvision:resnet50``, ``timm:NAME``, ``hf:DIR`` (a local directory), ``vfx:vgg16_bn?width=0.25``,
    ``package.module:factory`` or ``./file.py:factory``; options may stand behind a ``?``. Raises ArgumentError.

    >>> network = build("vfx:vgg16_bn?width=0.25", {"in_channels": 1})
    """
    place = address(model)
    given = {**place.options, **(options or {})}
    try:
        if place.name in FAMILIES:
            if not place.where:
                raise ArgumentError(f"model {model!r} names no network: {place.name}:NAME")
            model_built = FAMILIES[place.name].build(place.where, given)
        elif is_code(model):
            model_built = load_object(model, "model")(**given)
        else:
            families = ", ".join(f"{name}:…" for name in FAMILIES)
            raise ArgumentError(f"model {model!r} must be one of {families}, module:name or ./file.py:name")
    except ArgumentError:
        raise
    except ImportError as error:
        if extra_of(error.name or "") is not None:
            raise missing(error.name or "", f"model {model!r}") from error
        raise ArgumentError(f"model {model!r} needs the package {error.name}, which is not installed") from error
    except Exception as error:  # constructors raise any class
        cause = str(error).splitlines()[0] if str(error) else "no message"
        raise ArgumentError(f"model {model!r} cannot be built: {type(error).__name__}: {cause}") from error
    if not isinstance(model_built, nn.Module):
        raise ArgumentError(f"model {model!r} gave {type(model_built).__name__}, not a torch.nn.Module")
    return model_built.eval()


def usual_inputs(model: str) -> list[str]:
    """The inputs that the named network usually takes, as ``--input`` describes them. Raises ArgumentError."""
    place: Address = address(model)
    try:
        texts = FAMILIES[place.name].inputs(place.where) if place.name in FAMILIES else []
    except ImportError:
        texts = []
    if not texts:
        whose = repr(model) if model else "the network"
        raise ArgumentError(f"--input is missing: the shape of one sample that {whose} takes, e.g. -i 3x224x224")
    return texts


def _torchvision(name: str, options: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model, get_model_builder

    if any(key.startswith("weights") for key in options):
        raise ArgumentError("torchvision's weights are not downloaded here; give the file they lie in")
    parameters = inspect.signature(get_model_builder(name)).parameters
    none = {key: None for key in parameters if key.startswith("weights")}  # a detector's backbone has its own
    return get_model(name, **none, **options)


def _torchvision_inputs(name: str) -> list[str]:
    from torchvision.models import get_model_weights

    try:
        crop = get_model_weights(name).DEFAULT.transforms().crop_size[0]  # type: ignore[attr-defined]
    except (ValueError, AttributeError, TypeError, IndexError):
        return []
    return [f"3x{crop}x{crop}"]


def _timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm

    if options.get("pretrained"):
        raise ArgumentError("timm's weights are not downloaded here; give the file they lie in")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise ArgumentError(f"timm has no model {name!r}{f', but {close}' if close else ''}")
    return timm.create_model(name, **options)


def _timm_inputs(name: str) -> list[str]:
    import timm

    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return ["x".join(map(str, config.input_size))] if config is not None else []


def _hf_config(folder: str) -> Any:
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise ArgumentError(f"hf:{folder}: there is no {Path(folder) / 'config.json'}; only local directories are read")
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _hf(folder: str, options: Mapping[str, Any]) -> nn.Module:
    """The class that ``config.json`` names, of transformers' own; code in the folder is not run."""
    import transformers

    config = _hf_config(folder)
    for key, value in options.items():
        setattr(config, key, value)
    name = next(iter(config.architectures or ()), "")
    constructor = getattr(transformers, name, None) if name else None
    if constructor is None:
        raise ArgumentError(
            f"hf:{folder}: its config.json names {name or 'no class'}, which transformers does not have"
        )
    return constructor(config)


def _hf_inputs(folder: str) -> list[str]:
    config = _hf_config(folder)
    if hasattr(config, "image_size") and not hasattr(config, "vocab_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return [f"pixel_values={getattr(config, 'num_channels', 3)}x{height}x{width}"]
    return [f"input_ids=16:{config.vocab_size}"] if hasattr(config, "vocab_size") else []


def _vfx(name: str, options: Mapping[str, Any]) -> nn.Module:
    if name not in MODELS:
        raise ArgumentError(f"vfx has no model {name!r}; it has {', '.join(MODELS)}")
    return MODELS[name](**options)


FAMILIES: Mapping[str, Family] = {
    "torchvision": Family(_torchvision, _torchvision_inputs, "torchvision's constructors"),
    "timm": Family(_timm, _timm_inputs, "timm's constructors"),
    "hf": Family(_hf, _hf_inputs, "a local Hugging Face directory"),
    "vfx": Family(_vfx, lambda name: [], "the papers' networks"),
}
