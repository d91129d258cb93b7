"""Text in windows of as many tokens as the network reads: a file of the user's, or one that ships with Python.

Tokens are characters (newline and printable ASCII; others read "?") or those of a tokenizer in a local directory. The
last tenth is held out to measure on. Labels are the tokens one place on, at the same places.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vfx.errors import DataError
from vfx.extras import missing

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
HELD_OUT = 0.1


def text(context: int = 64, stride: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train_x (N, context), train_y, test_x (M, context), test_y of Python's language reference (int64).

    The windows of the held-out part do not overlap; those of the other begin every ``stride`` characters. The text is
    that of the running Python (``pydoc_data``), so it differs between versions.
    """
    # Imported here: half a megabyte that the networks do not need.
    from pydoc_data.topics import topics

    tokens = torch.tensor(characters("".join(topics[name] for name in sorted(topics))))
    return *_part(tokens, "train", context, stride), *_part(tokens, "test", context, context)


def text_file(
    path: str | Path, context: int, part: str = "train", *, tokenizer: str | None = None, stride: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return tokens (N, context) and those one place on, of the "train" or "test" part of a UTF-8 text file (int64).

    ``tokenizer``: a local directory with ``tokenizer.json`` (or whatever transformers reads from it), None for
    characters. Windows begin every ``stride`` tokens, by default they do not overlap. Raises DataError.

    >>> tokens, following = text_file("notes.txt", 64, tokenizer="gpt2")
    """
    try:
        written = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    encode = characters if tokenizer is None else tokenizer_of(Path(tokenizer))
    windows = _part(torch.tensor(encode(written), dtype=torch.int64), part, context, stride or context)
    if not len(windows[0]):
        raise DataError(f"the {part} part of {path} is shorter than the {context + 1} tokens of one window")
    return windows


def characters(written: str) -> list[int]:
    """The number of each character."""
    codes = {character: code for code, character in enumerate(CHARACTERS)}
    return [codes.get(character, codes["?"]) for character in written]


def tokenizer_of(folder: Path) -> Callable[[str], list[int]]:
    """What makes tokens of a text by the files in a local directory; nothing is downloaded. Raises errors of vfx."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of a tokenizer; nothing is downloaded")
    try:
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return lambda written: fast.encode(written, add_special_tokens=False).ids
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return lambda written: slow(written, add_special_tokens=False)["input_ids"]
    except ImportError as error:
        raise missing(error.name or "", "a tokenizer") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{folder} holds no tokenizer that can be read: {error}") from error


def _part(tokens: Tensor, part: str, context: int, stride: int) -> tuple[Tensor, Tensor]:
    split = round(len(tokens) * (1 - HELD_OUT))
    chosen = tokens[:split] if part == "train" else tokens[split:]
    if len(chosen) <= context:
        return chosen.new_empty((0, context)), chosen.new_empty((0, context))
    windows = chosen.unfold(0, context + 1, stride)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
