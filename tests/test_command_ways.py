"""How the command line behaves as a program: quick answers, lines in a pipe, one clear line when it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from vfx import __version__, cli
from vfx.cli.names import names_in
from vfx.match.catalogue import MATCHERS
from vfx.models import vgg11_bn
from vfx.normalize.catalogue import METHODS
from vfx.progress import show, stage, track
from vfx.pruning.groups import METHODS as CHANNEL_METHODS
from vfx.pruning.scores.catalogue import SCORES
from vfx.pruning.widths import ALLOCATIONS

ROOT = str(Path(__file__).parents[1])
MODEL = ["-m", "vfx:vgg11_bn?width=0.0625&in_channels=1", "-i", "1x32x32"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vfx", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[str]:
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(vgg11_bn(width=0.0625, in_channels=1).state_dict(), tmp_path / f"{seed}.pt")
    return [str(tmp_path / f"{seed}.pt") for seed in range(2)]


def test_help_needs_no_torch() -> None:
    code = "import sys, vfx.cli; assert not {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_version_help_and_wrong_options() -> None:
    assert run("--version").stdout == f"vfx {__version__}\n"
    short, long = run("-h"), run("--help")
    assert short.stdout == long.stdout
    assert "compare" in short.stdout
    assert "--evaluate" in run("merge", "-h").stdout
    wrong = run("merge", "--nothing")
    assert wrong.returncode == 2
    assert "No such option: --nothing" in wrong.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge a.pt b.pt -m resnet18", "--model 'resnet18' must be one of"),
        ("merge a.pt b.pt -m vfx:vgg11", "there is no file a.pt"),
        ("merge net.pt net.pt -m vfx:vgg11 -i 3xbig", "shape of one sample"),
        (
            "merge net.pt net.pt -m vfx:vgg11 --match magic",
            "--match 'magic' is unknown; choose one of auto, none, weight",
        ),
        ("merge net.pt net.pt -m vfx:vgg11 --normalize magic", "--normalize 'magic' is unknown"),
        ("merge net.pt net.pt -m vfx:vgg11 -o m.tflite", "cannot export to .tflite; use .onnx, .safetensors, .pt2"),
        ("repair net.pt net.pt -m vfx:vgg11", "--data is missing"),
        ("repair net.pt net.pt -m vfx:vgg11 -d digits --method magic", "--method 'magic' is unknown"),
        ("prune net.pt -m vfx:vgg11 --score magic", "--score 'magic' is unknown"),
        ("prune net.pt -m vfx:vgg11 -s a=b", "--sparsity takes 0.9"),
        ("prune-structured net.pt -m vfx:vgg11 --allocation magic", "--allocation 'magic' is unknown"),
        ("prune-structured net.pt -m vfx:vgg11 --budget flops", "must be key=value"),
        ("compare net.pt -m vfx:vgg11 -d digits -g preserve", "is no name=value,value"),
        ("evaluate net.pt -m vfx:vgg11", "--data is missing"),
        ("evaluate vfx:vgg11 -d digits", "evaluate needs checkpoints"),
        ("diagnose net.pt net.pt -m vfx:vgg11", "--data is missing"),
        ("barrier net.pt other.pt -m vfx:vgg11", "there is no file other.pt"),
        ("export net.pt -o m.onnx", "--model says which network"),
        ("layers -m vgg", "--model 'vgg' must be one of"),
        ("run none.toml out", "cannot be read"),
        ("merge dir dir -m vfx:vgg11", "dir is a folder, not a file; name a file in it: it has no model.safetensors"),
    ],
)
def test_mistakes_are_answered_before_torch_is_imported(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"\x80\x02 stands for a checkpoint, which is not read")
    (tmp_path / "dir").mkdir()
    code = (
        "import sys, vfx.cli\nfrom vfx.errors import VfxError\n"
        "try:\n    vfx.cli.app(sys.argv[1:])\n"
        "except VfxError as error:\n    print(error)\n    assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, *line.split()]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ROOT})
    assert found.returncode == 0, found.stderr
    assert message in found.stdout


def test_help_names_what_the_catalogues_hold() -> None:
    assert names_in("match/catalogue.py", "MATCHERS") == tuple(MATCHERS)
    assert names_in("normalize/catalogue.py", "METHODS") == tuple(METHODS)
    assert names_in("pruning/scores/catalogue.py", "SCORES") == tuple(SCORES)
    assert names_in("pruning/groups.py", "METHODS") == CHANNEL_METHODS
    assert names_in("pruning/widths.py", "ALLOCATIONS") == ALLOCATIONS
    with pytest.raises(LookupError, match="has no OTHERS"):
        names_in("match/catalogue.py", "OTHERS")


def test_a_pipe_gets_a_line_a_stage_and_quiet_none(
    checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["vfx", "merge", *checkpoints, *MODEL, "--match", "weight", "--normalize", "none"]

    def said(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*line, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().err

    try:
        stages = [text.partition("] ")[2] for text in said().splitlines() if text.startswith("[")]
        assert stages[:2] == ["trace", "symmetry"]
        assert "emit" in stages
        assert len(stages) == len(set(stages))
        assert said("--quiet") == ""
    finally:
        show("bars")


def test_loops_say_where_they_are_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("vfx.progress.time.monotonic", lambda: float(next(clock)))
    try:
        show("lines")
        assert list(track("abcdefgh", "letters", 8)) == list("abcdefgh")
        assert list(track("ab", "silent", 2, progress=False)) == ["a", "b"]
        lines = capsys.readouterr().err.splitlines()
        assert lines
        assert all("letters: " in line and line.endswith("of 8") for line in lines)
        show("nothing")
        stage("unheard")
        list(track("abcdefgh", "letters", 8))
        assert capsys.readouterr().err == ""
    finally:
        show("bars")


def test_a_stopped_command_ends_with_one_line_and_leaves_nothing(checkpoints: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    line = ["merge", *checkpoints, *MODEL, "--match", "weight", "--restarts", "100000", "-o", str(folder / "m.onnx")]
    command = [sys.executable, "-m", "vfx", *line]
    # what a shell starts behind its back ignores the signal, and so do its children
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as process:
        assert process.stderr is not None
        while "Align" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, rest = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 130
    assert rest.splitlines()[-1].startswith("Stopped: ")
    assert "Traceback" not in rest
    assert os.listdir(folder) == []
