"""Files are written whole or not at all, and where they cannot be written is said before any work is done.

What is being written has no name until it is whole (``O_TMPFILE``), so that the system clears up behind a process that
is killed. Where the system has no such files, and for folders of drafts, names begin with ``.vfx-`` and end in
``.tmp``; their writer holds a lock, and the next writer in the folder removes those whose lock is free.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vfx.errors import ArgumentError, OutputError
from vfx.extras import need_writer

try:
    import fcntl
except ImportError:  # Windows: no locks, so leftovers of killed processes stay
    fcntl = None  # type: ignore[assignment]

_PREFIX, _SUFFIX = ".vfx-", ".tmp"
_OPEN_FILES = Path("/proc/self/fd")  # where a file without a name is reached


def check_writable(path: str | os.PathLike[str], suffixes: Collection[str] = ()) -> None:
    """Raise unless a file can be written to ``path``, which is tried in its folder without leaving anything there.

    ``suffixes``: those that the file may have, if not any. Raises ArgumentError for another suffix; OutputError for a
    folder that is missing or takes no files, and for a path at which a folder, a device or a protected file stands;
    MissingExtraError where the package that writes such a file is not installed.
    """
    if suffixes and Path(path).suffix.lower() not in suffixes:
        kind = Path(path).suffix or "a file without suffix"
        raise ArgumentError(f"{path}: cannot export to {kind}; use {', '.join(suffixes)}")
    need_writer(Path(path).suffix)
    try:
        target = _target(path)
        _check_place(path, target)
        with _new_file(target.parent):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _refusal(path, error) from error


def make_folder(path: str | os.PathLike[str]) -> None:
    """A folder at ``path``, and those above it; nothing where it is there. Raises OutputError if there can be none."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from error


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """A text, written to a file as well where one is named."""
    if path is not None:
        write_atomic(path, text)
    return text


def csv_text(rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """Rows as CSV below the names of their cells (default: those of the first row); None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names or list(*rows[:1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8) in one step; a failed write leaves the old file, or none.

    A file that is replaced hands on its permissions, and its owner where the system allows that; a link keeps pointing
    to it. Raises OutputError if the file cannot be written.
    """
    try:
        target = _target(path)
        _check_place(path, target)
        with _new_file(target.parent) as draft:
            with open(draft.descriptor, "wb", closefd=False) as file:
                file.write(data.encode() if isinstance(data, str) else data)
            draft.replace(target)
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from error


@contextlib.contextmanager
def drafts_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder on the same disk as ``path``, for files that are too large to be held in memory.

    It is removed at the end, by the next writer if this process is killed. Raises OutputError if it cannot be made.
    """
    try:
        target = _target(path)
        _check_place(path, target)
        _clear_up(target.parent)
        folder = _hidden(target.parent)
        with _locked(target.parent):  # nobody clears it up before its own lock is held
            folder.mkdir()
            lock = _opened_and_locked(folder)
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from error
    try:
        yield folder
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Other processes that want to change the same set of files in ``folder`` wait until this one has done so."""
    with _locked(folder):
        yield


def move_into_place(draft: Path, path: Path, like: Path | None = None) -> None:
    """Let a whole file on the same disk take the place of ``path``, with the permissions of what stood there (or of
    ``like``)."""
    descriptor = os.open(draft, os.O_RDWR)
    try:
        _hand_on(descriptor, like or path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(draft, path)


def _target(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))  # a link keeps pointing to the file that is replaced


def _check_place(path: str | os.PathLike[str], target: Path) -> None:
    """Raise OutputError unless ``target`` is a file that may be replaced, or nothing yet, in a folder that exists."""
    if not target.parent.is_dir():
        problem = "is not a folder" if target.parent.exists() else "does not exist"
        raise OutputError(f"{path} cannot be written: the folder {target.parent} {problem}")
    if target.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it")
    if target.exists() and not target.is_file():
        kind = "FIFO" if target.is_fifo() else "socket" if target.is_socket() else "device"
        raise OutputError(f"{path} is a {kind}, not a file: results are written whole, under a file's name")
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(f"{path} is protected: make it writable, or choose another name")


def _refusal(path: str | os.PathLike[str], error: OSError | ValueError) -> OutputError:
    if isinstance(error, OutputError):
        return error
    return OutputError(f"{os.fspath(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}")


class _Draft:
    """A file that is being written: it may have no name yet."""

    def __init__(self, descriptor: int, folder: Path, name: Path | None):
        self.descriptor, self.folder, self.name = descriptor, folder, name

    def replace(self, target: Path) -> None:
        """Take the place of ``target`` once all is on the disk."""
        _hand_on(self.descriptor, target)
        os.fsync(self.descriptor)
        if self.name is None:
            self.name = self._named()
        if fcntl is None:  # Windows moves no open file
            self.close()
        os.replace(self.name, target)
        self.name = None

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _named(self) -> Path:
        name, folder = _hidden(self.folder), os.open(self.folder, os.O_RDONLY)
        try:  # with a folder's descriptor Python calls linkat, which alone follows the link to the open file
            os.link(_OPEN_FILES / str(self.descriptor), name, src_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)
        return name


@contextlib.contextmanager
def _new_file(folder: Path) -> Iterator[_Draft]:
    _clear_up(folder)
    with _locked(folder):  # nobody clears it up before its own lock is held
        descriptor, name = _nameless(folder), None
        if descriptor is None:
            name = _hidden(folder)
            descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        _lock(descriptor, wait=True)
    draft = _Draft(descriptor, folder, name)
    try:
        yield draft
    finally:
        if draft.name is not None:
            with contextlib.suppress(OSError):
                draft.name.unlink()
        draft.close()


def _nameless(folder: Path) -> int | None:
    """A file that vanishes with its writer; None where the system has none."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None or not _OPEN_FILES.is_dir():
        return None
    try:
        return os.open(folder, flag | os.O_RDWR, 0o666)
    except OSError:  # a file system without them; anything else shows where a named one is tried
        return None


def _hidden(folder: Path) -> Path:
    return folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def _hand_on(descriptor: int, target: Path) -> None:
    """Permissions and, where the system allows it, the owner of the file that is replaced."""
    if not target.exists():
        return
    old, new = target.stat(), os.fstat(descriptor)
    if hasattr(os, "fchown") and (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with contextlib.suppress(OSError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _clear_up(folder: Path) -> None:
    """Remove what killed writers left in ``folder``: drafts that nobody holds a lock on."""
    for left in folder.glob(f"{_PREFIX}*{_SUFFIX}") if fcntl else ():
        with contextlib.suppress(OSError), _locked(folder):
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # be it a link or a FIFO
            try:
                _lock(descriptor, wait=False)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = _opened_and_locked(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _opened_and_locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None where there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    _lock(descriptor, wait=True)
    return descriptor


def _lock(descriptor: int, wait: bool) -> None:
    """Take the lock of an open file; raises BlockingIOError if another holds it and ``wait`` is off."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # a file system without locks
        if not wait:
            raise
