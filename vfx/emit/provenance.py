"""Where a file comes from, written into it: version, call, settings, and the digests of the checkpoints it was made of.

One JSON text under the name ``vfx``, in the metadata of ``.onnx`` and ``.safetensors``. It holds no time and no name of
a machine, so the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vfx import __version__
from vfx.shards import files_of

KEY = "vfx"


def provenance(model: Any, more: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The metadata of a file that holds ``model``, a Result (whose report says how it was made) or a module.

    ``more``: what else is known, such as the command and the files.
    """
    report = getattr(model, "report", None)
    facts: dict[str, Any] = {"version": __version__}
    if report is not None:
        facts |= {"passes": list(report.passes), "settings": dict(report.choices)}
        facts |= {"outcome": report.outcome} if getattr(report, "outcome", "") else {}
    return _metadata(facts | dict(more or {}))


def with_facts(metadata: Mapping[str, str], **facts: Any) -> dict[str, str]:
    """The metadata of a file with more facts."""
    return {**metadata, **_metadata(json.loads(metadata.get(KEY, "{}")) | facts)}


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    return {KEY: json.dumps(facts, default=str, sort_keys=True, ensure_ascii=False)}


def digests(files: Iterable[str | Path]) -> list[dict[str, str]]:
    """The name and the SHA-256 of each file of some checkpoints, in their order."""
    digested = []
    for file in (shard for path in files for shard in files_of(Path(path))):
        with file.open("rb") as opened:
            digested.append({"file": file.name, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()})
    return digested
