"""Real text without a download: the language reference that ships with Python (``pydoc_data``), by characters."""

import torch
from torch import Tensor

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
HELD_OUT = 0.1


def text(context: int = 64, stride: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train_x (N, context), train_y, test_x (M, context), test_y: characters, and those one place on (int64).

    The vocabulary is newline and printable ASCII; other characters read "?". The last tenth is held out, in windows
    that do not overlap; those of the training text begin every ``stride`` characters. The text is that of the running
    Python, so it differs between versions.
    """
    # Imported here: half a megabyte that the networks do not need.
    from pydoc_data.topics import topics

    codes = {character: code for code, character in enumerate(CHARACTERS)}
    joined = "".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor([codes.get(character, codes["?"]) for character in joined])
    split = round(len(tokens) * (1 - HELD_OUT))
    return *_windows(tokens[:split], context, stride), *_windows(tokens[split:], context, context)


def _windows(tokens: Tensor, context: int, stride: int) -> tuple[Tensor, Tensor]:
    windows = tokens.unfold(0, context + 1, stride)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
