"""The command line refuses an output that it cannot write before it reads anything, and writes what it can."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vfx import cli
from vfx.errors import ArgumentError, CheckpointError, OutputError, VfxError
from vfx.models import vgg11_bn

MODEL = ["-m", "vfx.models:vgg11_bn", "-a", "width=0.125", "-a", "in_channels=1", "-i", "1x32x32"]
GONE = ["gone0.pt", "gone1.pt"]  # whatever reads them fails, so an error about the output came first
COMMANDS = {
    "merge": ["merge", *GONE, *MODEL],
    "compare": ["compare", *GONE, *MODEL],
    "evaluate": ["evaluate", *GONE, *MODEL, "--data", "gone.npz"],
    "repair": ["repair", *GONE, *MODEL, "--data", "gone.npz"],
    "transfer": ["transfer", *GONE, "gone2.pt", *MODEL],
    "prune": ["prune", GONE[0], *MODEL, "-s", "0.5"],
    "prune-structured": ["prune-structured", GONE[0], *MODEL, "-s", "0.5"],
    "diagnose": ["diagnose", *GONE, *MODEL, "--data", "gone.npz"],
    "barrier": ["barrier", *GONE, *MODEL, "--data", "gone.npz"],
    "export": ["export", GONE[0], *MODEL],
    "profile": ["profile", "-m", "gone:net", "-i", "4"],
    "symmetry": ["symmetry", "-m", "gone:net", "-i", "4"],
}
FILES = [  # (command, option, a good suffix)
    *((command, "-o", ".onnx") for command in ("merge", "repair", "transfer", "prune", "prune-structured", "export")),
    *((command, "--json", ".json") for command in COMMANDS if command not in ("export", "symmetry")),
    *(("diagnose", option, suffix) for option, suffix in (("--html", ".html"), ("--csv", ".csv"))),
    *((command, "--draw", ".png") for command in ("compare", "barrier")),
    *((command, "--csv", ".csv") for command in ("compare", "evaluate", "profile")),
    ("compare", "--markdown", ".md"),
    ("compare", "--resume", ".json"),
    ("symmetry", "--draw", ".svg"),
]


def refused(*arguments: str) -> VfxError:
    error = CliRunner().invoke(cli.app, list(arguments)).exception
    assert isinstance(error, VfxError), error
    return error


@pytest.mark.parametrize(("command", "option", "suffix"), FILES)
def test_places_are_checked_first(
    command: str, option: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").write_bytes(b"")
    out = ["-o", "first.onnx"] if command == "export" and option != "-o" else []
    for place, message in (
        (f"missing/x{suffix}", "the folder .*missing does not exist"),
        (f"file/x{suffix}", "the folder .*file is not a folder"),
        (f"folder{suffix}", "is a folder; name a file in it"),
    ):
        error = refused(*COMMANDS[command], *out, option, place)
        assert isinstance(error, OutputError)
        with pytest.raises(OutputError, match=message):
            raise error
    good = refused(*COMMANDS[command], *out, option, f"x{suffix}")  # negative control: now the input is missed
    assert not isinstance(good, OutputError)
    assert "gone" in str(good)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", f"folder{suffix}"]


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, o, _ in FILES if o in ("-o", "--draw")])
def test_suffixes_are_checked_first(command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(*COMMANDS[command], option, "x.tflite")
    assert isinstance(error, ArgumentError)
    assert str(error).startswith("x.tflite: cannot export to .tflite; use .")


@pytest.mark.parametrize(
    ("arguments", "early"),
    [
        (["merge", *GONE, *MODEL, "--heads", "1"], True),
        (["merge", *GONE, *MODEL, "--heads", "classifier.4"], True),
        (["merge", *GONE, *MODEL, "--preserve", "2"], True),
        (["prune-structured", GONE[0], *MODEL, "-s", "0.5"], True),
        (["prune-structured", GONE[0], *MODEL, "--budget", "flops=0.5"], True),
        (["export", "gone.pt2", "-i", "1x32x32"], True),
        (["merge", *GONE, *MODEL], False),
        (["prune-structured", GONE[0], *MODEL, "-s", "0"], False),
        (["prune", GONE[0], *MODEL, "-s", "0.5"], False),
        (["export", GONE[0], *MODEL], False),
    ],
)
def test_a_network_of_no_class_is_no_state_dict(
    arguments: list[str], early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(*arguments, "-o", "x.onnx", "-o", "x.safetensors")
    assert isinstance(error, ArgumentError if early else CheckpointError)
    assert ("x.safetensors: " in str(error) and "export it to .pt2 or .onnx" in str(error)) == early


def test_one_place_for_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for second in (["-o", "./x.onnx"], ["--json", str(tmp_path / "x.onnx")]):
        with pytest.raises(ArgumentError, match=r"x.onnx is named twice among the files to write"):
            raise refused(*COMMANDS["merge"], "-o", "x.onnx", *second)


def test_what_can_be_written_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that shows only behind the work costs nothing but the file it is about."""
    import vfx.emit.files as files

    monkeypatch.chdir(tmp_path)
    torch.save(vgg11_bn(width=0.125, in_channels=1).state_dict(), "edge.pt")

    def broken(*_: object) -> None:
        raise OutputError("x.pt2 cannot be written: No space left on device")

    monkeypatch.setitem(files._WRITERS, ".pt2", broken)
    arguments = ["prune", "edge.pt", *MODEL, "-s", "0.5", "--json", "x.json", "-o", "x.pt2", "-o", "x.safetensors"]
    with pytest.raises(OutputError, match="No space left"):
        raise refused(*arguments)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["edge.pt", "x.json", "x.safetensors"]


def test_a_demo_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_bytes(b"")
    with pytest.raises(OutputError, match="demo' cannot be written: File exists"):
        raise refused("demo", "-o", str(tmp_path / "demo"))


@pytest.mark.filterwarnings("default")
def test_notes_on_checkpoints_are_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = vgg11_bn(width=0.125, in_channels=1).state_dict()
    for name in "ab":
        torch.save({"state_dict": {f"module.{key}": x for key, x in state.items()}}, tmp_path / f"{name}.pth.tar")
    paths = [str(tmp_path / name) for name in ("a.pth.tar", "b.pth.tar", "merged.safetensors")]
    monkeypatch.setattr(sys, "argv", ["vfx", "merge", *paths[:2], *MODEL, "-o", paths[2]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    key = "features.0.weight"
    lines = [f"note: {name}.pth.tar: names are stripped to the model's, as module.{key} to {key}" for name in "ab"]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if ".pth.tar" in line] == lines
    assert all(line.startswith(("note: ", "[")) for line in said)


def test_entry_chooses_among_state_dicts(tmp_path: Path) -> None:
    states = [vgg11_bn(width=0.125, in_channels=1).state_dict() for _ in range(2)]
    torch.save({"model": states[0], "ema": states[1]}, tmp_path / "last.pt")
    for options, expected in ((["--entry", "ema"], states[1]), (["--entry", "model"], states[0])):
        out = tmp_path / "x.safetensors"
        CliRunner().invoke(
            cli.app, ["export", str(tmp_path / "last.pt"), *MODEL, *options, "-o", str(out)], catch_exceptions=False
        )
        assert all(torch.equal(x, expected[key]) for key, x in load_file(out).items())
    for command in (
        "merge",
        "compare",
        "repair",
        "transfer",
        "prune",
        "prune-structured",
        "diagnose",
        "barrier",
        "export",
    ):
        out = ["-o", "x.onnx"] if command == "export" else []
        assert "gone" in str(refused(*COMMANDS[command], *out, "--entry", "ema"))
