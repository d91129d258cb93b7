"""Damaged and hostile files made from good ones: bytes, members of archives, values of JSON and of array headers.

Every case follows from a random generator, so that a case can be made again from its number.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

TEXTS = (
    "", "x", "a\nb", "../../x", "\x00", "é" * 50, "x" * 5000, "__import__('os').mkdir('{mark}')", "Symbol('s0')",
    "Pow(Integer(9), Integer(999999999))", "2**2**2**2**2**2", "u9999999999", "torch.os.mkdir", "weight_0", "NaN",
    "_operator.methodcaller", "torch.ops.aten.from_file.default", "torch.ops.aten.full.default", "builtins.dict",
    "torch.ops.aten.relu.default", "torch.ops.higher_order.cond", "0.weight", "collections.defaultdict", "{{}}",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 7, 255, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 70, 0.5, 1e308)
HEADERS = (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 3), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    b"{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (3,), }",
    b"{'descr': '<U4', 'fortran_order': True, 'shape': (-3,), }",
    b"{'descr': '>f8', 'fortran_order': False, 'shape': (), }",
    b"{'descr': 'V0', 'fortran_order': 0, 'shape': 3, }",
    b"__import__('os').mkdir('{mark}')",
    b"[" * 5000,
    b"(lambda: 1)()",
)
Random = random.Random
Mutator = Callable[[Random, bytes, str], bytes]


def mutate_bytes(rng: Random, data: bytes, mark: str) -> bytes:
    """A few bits, bytes, runs or numbers changed, cut out, doubled or put in; or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 2, 4, 8, 64, max(1, len(changed) // 3)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            number = struct.pack(rng.choice("<>") + "Q", rng.choice((0, 1, 0xFFFF, 1 << 31, 1 << 40, (1 << 64) - 1)))
            changed[at : at + length] = number[: min(length, 8)] if rng.random() < 0.5 else number[-min(length, 8) :]
        elif kind == 5:
            del changed[at:]
        else:
            start = rng.randrange(len(changed) + 1)
            changed[at : at + length] = changed[start : start + length]
    return bytes(changed)


def mutate_json(rng: Random, data: bytes, mark: str) -> bytes:
    """Values of a JSON text exchanged for each other or for odd ones, keys renamed, left out and added."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, (dict, list)):
        return mutate_bytes(rng, data, mark)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        spots = list(_spots(tree))
        if not spots:
            break
        owner, key = rng.choice(spots)
        if rng.random() < 0.15:
            del owner[key]
        elif rng.random() < 0.1 and isinstance(owner, dict):
            owner[_text(rng, mark)] = owner.pop(key)
        else:
            owner[key] = _value(rng, owner[key], spots, mark)
    return json.dumps(tree).encode()


def mutate_zip(rng: Random, data: bytes, mark: str, inner: Callable[[str], Mutator]) -> bytes:
    """Members changed (by ``inner`` of their name), left out, renamed, exchanged, added; written as a whole archive."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data, mark)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(members))
        name, content = members[at]
        kind = rng.random()
        if kind < 0.75:
            members[at] = (name, inner(name)(rng, content, mark))
        elif kind < 0.8 and len(members) > 1:
            del members[at]
        elif kind < 0.85:
            members[at] = (name.rpartition("/")[0] + "/" + (_text(rng, mark)[:60] or "x"), content)
        elif kind < 0.9:
            members[at] = (name, rng.choice(members)[1])
        elif kind < 0.95:
            members[at] = (name, _hostile_pickle(mark))
        else:
            members.append((rng.choice((name, name + "x", "data/../../x")), content))
    return _zipped(rng, members)


def mutate_npy(rng: Random, data: bytes, mark: str) -> bytes:
    """The header of a .npy file exchanged for an odd one, or its bytes changed."""
    if rng.random() < 0.6:
        return mutate_bytes(rng, data, mark)
    header = rng.choice(HEADERS).replace(b"{mark}", mark.encode())
    header = header if rng.random() < 0.7 else mutate_bytes(rng, header, mark)
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(header), 65535)) + header + data[128:]


def mutate_safetensors(rng: Random, data: bytes, mark: str) -> bytes:
    """The JSON header of a safetensors file changed, its length kept true; or its bytes changed."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, mark)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(rng, data[8 : 8 + length], mark)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _spots(tree: Any) -> Any:
    """Every place of a value in a tree, as its container and key."""
    stack = [tree]
    while stack:
        owner = stack.pop()
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        for key in keys:
            yield owner, key
            if isinstance(owner[key], (dict, list)):
                stack.append(owner[key])


def _value(rng: Random, old: Any, spots: list[Any], mark: str) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        owner, key = rng.choice(spots)
        return json.loads(json.dumps(owner.get(key) if isinstance(owner, dict) else owner[min(key, len(owner) - 1)]))
    if kind == 1 and isinstance(old, str) and old:
        return mutate_bytes(rng, old.encode(), mark).decode("utf-8", "replace")
    if kind == 2:
        return rng.choice((None, True, False, [], {}, [[]], [old], {"x": old}))
    if kind == 3 and isinstance(old, int):
        return old + rng.choice((-1, 1, 1000))
    return rng.choice(NUMBERS) if kind < 5 else _text(rng, mark)


def _text(rng: Random, mark: str) -> str:
    return rng.choice(TEXTS).replace("{mark}", mark)


def _hostile_pickle(mark: str) -> bytes:
    """Unpickling it without restrictions makes an empty folder."""
    return b"cos\nmkdir\n(V" + mark.encode() + b"\ntR."


def _zipped(rng: Random, members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
        if rng.random() < 0.05:
            rng.choice(archive.infolist()).file_size = rng.choice((0, 1, 1 << 31, 1 << 45))
    return buffer.getvalue()
