"""Writing: whole or not at all, with the permissions of what is replaced, and refused before the work is done."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vfx.files
from vfx.errors import ArgumentError, OutputError
from vfx.files import check_writable, drafts_beside, write_atomic


@pytest.fixture(params=["nameless", "named"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files that have no name until they are whole, and without."""
    if request.param == "named":
        monkeypatch.setattr(vfx.files, "_nameless", lambda folder: None)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.usefixtures("system")
def test_writing_is_atomic_and_follows_links(tmp_path: Path) -> None:
    target, link = tmp_path / "real.bin", tmp_path / "link.bin"
    link.symlink_to(target)
    write_atomic(link, b"one")
    write_atomic(link, "zwölf")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "zwölf"
    assert names(tmp_path) == ["link.bin", "real.bin"]


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_hands_on_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o7777 == mode


@pytest.mark.usefixtures("system")
def test_a_new_file_has_the_permissions_that_the_user_gives_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "model.bin", b"new")
    assert (tmp_path / "model.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    path.chmod(0o660)
    write_atomic(path, b"new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (12345, 54321, 0o660)


def _folder(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing/model.bin", None, r"the folder .*missing does not exist"),
        ("file/model.bin", lambda path: path.parent.write_bytes(b""), r"the folder .*file is not a folder"),
        ("model.bin", _folder, "is a folder; name a file in it"),
        ("model.bin", _fifo, "is a FIFO, not a file"),
        ("m", _socket, "is a socket, not a file"),
        ("model.bin", lambda path: path.symlink_to(path.parent / "gone" / "x"), r"the folder .*gone does not exist"),
        ("n" * 300, None, "File name too long"),
        ("nu\0ll", None, "null"),
        (".", None, "is a folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_places_that_hold_no_file_are_refused(
    tmp_path: Path, name: str, make: Callable[[Path], Any] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path(name)
    if make is not None:
        make(path)
    before = names(tmp_path)
    for refuse in (lambda: check_writable(path), lambda: write_atomic(path, b"new")):
        with pytest.raises(OutputError, match=message):
            refuse()
        assert names(tmp_path) == before


def test_a_device_is_refused() -> None:
    with pytest.raises(OutputError, match="/dev/null is a device"):
        write_atomic("/dev/null", b"new")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that takes no files, not even root's")
def test_a_folder_that_takes_no_files_is_refused() -> None:
    for refuse in (lambda: check_writable("/proc/model.bin"), lambda: write_atomic("/proc/model.bin", b"new")):
        with pytest.raises(OutputError, match=r"/proc/model.bin' cannot be written"):
            refuse()


def test_a_protected_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    path.chmod(0o444)
    monkeypatch.setattr(vfx.files.os, "access", lambda *_: False)  # as for anybody but root
    with pytest.raises(OutputError, match="is protected"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.usefixtures("system")
def test_a_good_place_is_accepted_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_bytes(b"old")
    check_writable(tmp_path / "new.json", (".json",))
    check_writable(tmp_path / "old.json")
    assert names(tmp_path) == ["old.json"]
    assert (tmp_path / "old.json").read_bytes() == b"old"
    with pytest.raises(ArgumentError, match=r"x.txt: cannot export to .txt; use .json, .csv"):
        check_writable(tmp_path / "x.txt", (".json", ".csv"))


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vfx.files.os, step, full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write_atomic(path, b"new")
    assert names(tmp_path) == ["model.bin"]
    assert path.read_bytes() == b"old"


# killed writers -------------------------------------------------------------------------------------------------------

WRITER = """
import sys, vfx.files
from pathlib import Path
if sys.argv[2] == "named":
    vfx.files._nameless = lambda folder: None
print("ready", flush=True)
while True:
    for value in (b"a", b"b"):
        vfx.files.write_atomic(sys.argv[1], value * 3_000_000)
"""
DRAFTER = """
import sys, time, vfx.files
with vfx.files.drafts_beside(sys.argv[1]) as folder:
    (folder / "draft").write_bytes(b"x")
    print("ready", flush=True)
    time.sleep(60)
"""


def _started(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def _killed(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("kind", ["nameless", "named"])
def test_a_killed_writer_leaves_a_whole_file_and_the_next_one_clears_up(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"a" * 3_000_000)
    for moment in (0.003, 0.02, 0.051):
        process = _started(WRITER, str(path), kind)
        time.sleep(moment)
        _killed(process)
        content = path.read_bytes()
        assert content in (b"a" * 3_000_000, b"b" * 3_000_000)
    write_atomic(tmp_path / "other.bin", b"new")
    assert names(tmp_path) == ["model.bin", "other.bin"]


def test_drafts_are_removed_at_the_end_or_by_the_next_writer(tmp_path: Path) -> None:
    with drafts_beside(tmp_path / "model.onnx") as folder:
        (folder / "draft").write_bytes(b"x")
        write_atomic(tmp_path / "other.bin", b"new")
        assert (folder / "draft").exists()  # its writer lives
    assert names(tmp_path) == ["other.bin"]
    process = _started(DRAFTER, str(tmp_path / "model.onnx"))
    write_atomic(tmp_path / "other.bin", b"new")
    assert len(names(tmp_path)) == 2  # as long as its writer lives
    _killed(process)
    assert len(names(tmp_path)) == 2
    write_atomic(tmp_path / "other.bin", b"new")
    assert names(tmp_path) == ["other.bin"]


def test_only_drafts_are_cleared_up(tmp_path: Path) -> None:
    (tmp_path / "data.tmp").write_bytes(b"x")
    (tmp_path / ".vfx-notes.txt").write_bytes(b"x")
    os.mkfifo(tmp_path / ".vfx-0.tmp")
    (tmp_path / ".vfx-1.tmp").symlink_to(tmp_path / "data.tmp")
    write_atomic(tmp_path / "model.bin", b"new")
    assert {"data.tmp", ".vfx-notes.txt", "model.bin"} <= set(names(tmp_path))
