"""What stands at a path: a file to be read, or something that only has its name."""

from __future__ import annotations

from pathlib import Path

from vfx.errors import VfxError

_BEGINNING = 1024  # bytes that tell a text from anything else
_FORMATS = {  # how other files begin, and what to do about them
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"BZh": "bzip2-compressed; unpack it first",
    b"\xfd7zXZ": "xz-compressed; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x89HDF": "an HDF5 file; convert it to safetensors",
    b"GGUF": "a GGUF file; convert it to safetensors",
    b"%PDF": "a PDF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
}


def require_file(path: Path, kind: type[VfxError]) -> None:
    """Raise ``kind``, which says what stands at ``path``, unless it is a binary file that can be opened.

    A git-lfs pointer, a web page, another text, a compressed file and an empty one are named; nothing that is no file
    is opened, so that a FIFO does not block.
    """
    try:
        if not path.is_file():
            raise kind(_no_file(path))
        with path.open("rb") as file:
            problem = _foreign(file.read(_BEGINNING))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, VfxError):
            raise
        raise kind(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if problem:
        raise kind(f"{path} is {problem}")


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder, not a file; name a file in it"
    if path.is_symlink() and not path.exists():
        return f"there is no file {path}: it is a link to {path.readlink()}, which does not exist"
    return f"{path} is no regular file" if path.exists() else f"there is no file {path}"


def _foreign(start: bytes) -> str:
    """What a file is that begins so, "" where it may be of a binary format."""
    if not start:
        return "empty"
    for magic, name in _FORMATS.items():
        if start.startswith(magic):
            return name
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    text = _text(start)
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer, not the file it points to; fetch that by: git lfs pull"
    if text.lower().startswith(("<!doctype html", "<html")):
        return (
            "an HTML page, as a download gives in place of a file that needs a login or is gone; fetch the file again"
        )
    return f"a text that begins {text.splitlines()[0][:60]!r}" if text else ""


def _text(start: bytes) -> str:
    """The beginning of a text, "" if it is none."""
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.end < len(start) or len(start) < _BEGINNING:  # only a character that the end cuts is fine
            return ""
        text = start[: error.start].decode()
    return text.strip() if all(character.isprintable() or character in "\t\n\r\f\x1b" for character in text) else ""
