"""Python objects that the user names: ``package.module:name``, or ``./file.py:name``.

This runs the user's own code, because they ask for it by name; nothing that was found in a checkpoint is ever imported.
Modules of the working folder can be imported, behind installed ones of the same name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from vfx.errors import ArgumentError

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_][\w.]*")
_FILE = re.compile(r".+\.py:[A-Za-z_][\w.]*")


def is_code(text: str) -> bool:
    """Whether a text has the form ``package.module:name`` or ``file.py:name`` (with options behind a ``?``)."""
    place = text.partition("?")[0]
    return bool(_MODULE.fullmatch(place) or _FILE.fullmatch(place))


def load_object(text: str, owner: str) -> Any:
    """The object that ``text`` names; ``owner`` stands in front of messages. Raises ArgumentError.

    >>> build = load_object("torchvision.models:resnet18", "--model")
    """
    place, _, name = text.partition("?")[0].rpartition(":")
    try:
        module = _file(Path(place)) if place.endswith(".py") else _module(place)
    except ArgumentError:
        raise
    except Exception as error:  # the user's own code raises any class
        cause = str(error).splitlines()[0] if str(error) else "no message"
        raise ArgumentError(f"{owner} {text!r} cannot be imported: {type(error).__name__}: {cause}") from error
    loaded: Any = module
    for part in name.split("."):
        if not hasattr(loaded, part):
            raise ArgumentError(f"{owner} {text!r} cannot be imported: {place} has no {name!r}")
        loaded = getattr(loaded, part)
    return loaded


def _module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # behind all others: no file there takes the place of an installed module
    return importlib.import_module(name)


def _file(path: Path) -> Any:
    if not path.is_file():
        raise ArgumentError(f"there is no file {path}")
    whole = path.resolve()
    name = f"_vfx_user_{whole.stem}_{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    if str(whole.parent) not in sys.path:
        sys.path.append(str(whole.parent))  # for the modules beside it
    sys.modules[name] = module  # pickle and dataclasses look a class's module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
