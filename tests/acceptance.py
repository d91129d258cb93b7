"""What a new user does, from the wheel in a clean environment: ``make acceptance``, apart from the tests.

Each step runs the installed commands from a folder of its own, checks what they wrote, and prints its seconds. A user's
own ``passes.py`` lies beside all of it. ``--reuse PYTHON`` takes the packages of another interpreter's environment
instead of installing them, ``--epochs`` shortens the demo, ``--skip`` leaves steps out (with ``--folder``, in which an
earlier run left what they make).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
NETWORK = "torchvision:mobilenet_v2?num_classes=10&width_mult=0.25&dropout=0.0"
MODEL = ["-m", NETWORK, "-i", "3x32x32"]
PHOTOS = ["--data", "folder:photos", "--evaluate", "folder:photos", "--max-samples", "256"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Trial:
    """The folder in which everything happens, its environment, and the seconds of each step."""

    folder: Path
    reuse: str | None
    epochs: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def python(self) -> str:
        return str(self.folder / "venv" / "bin" / "python")

    def run(self, *command: str) -> str:
        """Run a command in the working folder; its standard output. Raises SystemExit with all that it said."""
        environment = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            list(command), cwd=self.work, env=environment | {"MPLBACKEND": "agg"}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def vfx(self, *arguments: str) -> str:
        """Run the installed command; what it printed is shown."""
        print("$ vfx " + " ".join(arguments), flush=True)
        said = self.run(str(self.folder / "venv" / "bin" / "vfx"), *arguments)
        print(textwrap.indent(said, "  "), flush=True)
        return said

    def code(self, text: str, *arguments: str) -> str:
        """Run Python code in a fresh process of the environment."""
        return self.run(self.python, "-c", textwrap.dedent(text), *arguments)

    @property
    def work(self) -> Path:
        return self.folder / "work"


def build(trial: Trial) -> None:
    """The wheel, in which nothing stands at the top but vfx."""
    run = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(trial.folder), str(ROOT)]
    subprocess.run(run, check=True)


def install(trial: Trial) -> None:
    """A clean environment with the wheel and its extras (or with the packages of another one)."""
    (wheel,) = trial.folder.glob("vfx-*.whl")
    venv.create(trial.folder / "venv", with_pip=True)
    pip = [trial.python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if trial.reuse:
        asked = [trial.reuse, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
        packages = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        (own,) = (trial.folder / "venv" / "lib").glob("python*/site-packages")
        (own / "reused.pth").write_text(packages + "\n")
        subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    else:
        subprocess.run([*pip, f"{wheel}[onnx,plots,zoo]"], check=True)


def first_words(trial: Trial) -> None:
    """Version and help, the second time in half a second; a user's ``passes.py`` is theirs."""
    (trial.work / "passes.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(4, 2)\n")
    assert re.fullmatch(r"vfx \d+\.\d+\.\d+\n", trial.vfx("--version"))
    trial.run(str(trial.folder / "venv" / "bin" / "vfx"), "--help")
    start = time.perf_counter()
    trial.run(str(trial.folder / "venv" / "bin" / "vfx"), "--help")
    print(f"vfx --help: {time.perf_counter() - start:.2f} s")
    place = trial.code("import vfx, passes; vfx.Align; print(passes.make(), passes.__file__, vfx.__file__)")
    assert f"{trial.work / 'passes.py'} {trial.folder / 'venv'}" in place, place
    assert "1" in trial.vfx("layers", "-m", "passes:make", "-i", "4")


def demo(trial: Trial) -> None:
    """The papers' table on digits."""
    trial.vfx("demo", "--epochs", str(trial.epochs))
    assert {"merged.onnx", "table.json", "accuracy.png"} <= {path.name for path in (trial.work / "demo").iterdir()}


def prepare(trial: Trial) -> None:
    """What the user brings: a folder of images, and two checkpoints of a network trained with DataParallel."""
    print(
        trial.code(
            """
            import torch, torchvision
            from pathlib import Path
            from PIL import Image
            from sklearn.datasets import load_digits
            from vfx.data import read
            from vfx.models import Training, fit
            pixels, labels = load_digits(return_X_y=True)
            for index, (one, label) in enumerate(zip(pixels, labels)):
                place = Path("photos", "val" if index % 5 == 0 else "train", str(label), f"{index}.png")
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((one * 15.9).astype("uint8").reshape(8, 8)).resize((32, 32)).save(place)
            model = "torchvision:mobilenet_v2"
            batches = list(read("folder:photos", example_inputs=torch.zeros(2, 3, 32, 32), model=model))
            x, y = (torch.cat([batch[index] for batch in batches]) for index in (0, 1))
            for seed, name in enumerate(("a.pth", "b.pth")):
                torch.manual_seed(seed)
                net = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25, dropout=0.0)
                fit(net, x, y, Training(epochs=8, lr=0.1, batch_size=32, seed=seed))
                torch.save({"epoch": 8, "state_dict": torch.nn.DataParallel(net).state_dict()}, name)
                print(f"trained {name}")
            """
        )
    )


def merge(trial: Trial) -> None:
    """The two checkpoints and the folder: a network, its accuracy beside the edges', an ONNX file."""
    trial.vfx("merge", "a.pth", "b.pth", *MODEL, *PHOTOS, "-o", "merged.onnx", "--json", "merged.json")
    rows = json.loads((trial.work / "merged.json").read_text())["evaluation"]["networks"]
    edges = [row["accuracy"] for row in rows if row["name"] in ("a.pth", "b.pth")]
    assert len(edges) == 2 and rows[-1]["accuracy"] > min(edges) - 0.05, rows  # noqa: PT018
    assert (trial.work / "merged.onnx").stat().st_size > 10**5


def prune(trial: Trial) -> None:
    """Half of the channels: an ONNX file, its size and latency, and the accuracy that the file itself has."""
    said = trial.vfx("prune-structured", "a.pth", *MODEL, *PHOTOS, "-s", "0.5", "-o", "small.onnx")
    assert re.search(r"wrote small\.onnx \([\d.]+ [kM]B\)", said), said
    assert "ms/" in said, said
    said = trial.vfx("evaluate", "small.onnx", "a.pth", *MODEL, "--data", "folder:photos")
    assert "small.onnx" in said, said


def recipes(trial: Trial) -> None:
    """The same recipe twice: the same bytes of every file, and a page that can be read."""
    lines = {
        "action": "prune_structured", "model": NETWORK, "weights": ["a.pth"],
        "input": ["3x32x32"], "data": "folder:photos", "evaluate": "folder:photos",
    }  # fmt: skip
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
    (trial.work / "recipe.toml").write_text(text + "\n[options]\nsparsity = 0.5\nmax_samples = 256\n")
    for out in ("first", "second"):
        trial.vfx("run", "recipe.toml", out)
    first, second = ({p.name: p.read_bytes() for p in (trial.work / out).iterdir()} for out in ("first", "second"))
    assert set(first) >= {"config.json", "model.safetensors", "recipe.toml", "report.json", "report.html", "README.md"}
    assert first == second, [name for name in first if first[name] != second.get(name)]
    read_page(first["report.html"].decode())
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no browser here: the page was read, not rendered")
        return
    look = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,2400"]
    page = (trial.work / "first" / "report.html").as_uri()
    read_page(trial.run(*look, "--dump-dom", page))
    trial.run(*look, f"--screenshot={trial.folder / 'report.png'}", page)
    print(f"rendered: {trial.folder / 'report.png'}")


def read_page(text: str) -> None:
    """The page's tags close, it needs no other file, and it has its sections."""

    class Reader(HTMLParser):
        opened: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            assert tag not in ("script", "link", "iframe"), tag
            if tag not in ("meta", "br", "img"):
                self.opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.opened.pop() == tag, tag

    reader = Reader()
    reader.feed(text)
    assert not reader.opened, reader.opened
    for title in ("Accuracy", "Cost", "Checks", "Settings", "Versions"):
        assert f"<h2>{title}" in text, title


def load(trial: Trial) -> None:
    """The pruned network in a fresh process, in torchvision's class."""
    said = trial.code(
        """
        import torch, vfx
        net = vfx.from_pretrained("first")
        print(type(net).__name__, sum(x.numel() for x in net.parameters()), net(torch.zeros(1, 3, 32, 32)).shape)
        """
    )
    print(said)
    assert said.startswith("MobileNetV2 ") and "[1, 10]" in said, said  # noqa: PT018


def hugging_face(trial: Trial) -> None:
    """A directory in, a directory out: class, config and generation stay."""
    said = trial.code(
        """
        import torch, transformers, vfx
        from transformers import AutoModelForCausalLM, LlamaConfig
        sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("llama")
        net = AutoModelForCausalLM.from_pretrained("llama")
        ids = torch.randint(50, (16, 12))
        small = vfx.prune_structured(net, {"input_ids": ids[:2]}, sparsity=0.5, data=[{"input_ids": ids}],
                                     units="blocks")
        small.module.save_pretrained("small-llama")
        again = AutoModelForCausalLM.from_pretrained("small-llama")
        assert type(again) is type(net)
        assert torch.equal(again(ids).logits, small(ids).logits)
        args = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(again.generate(ids[:1], **args), again.generate(ids[:1], use_cache=False, **args))
        print(net.config.intermediate_size, again.config.intermediate_size, sum(x.numel() for x in again.parameters()))
        """
    )
    print(said)
    command = ["prune", "small-llama", "-m", "hf:small-llama", "-s", "0.5", "-o", "sparse.safetensors"]
    trial.vfx(*command)


STEPS: dict[str, Callable[[Trial], None]] = {
    "wheel": build,
    "install": install,
    "version, help, own passes.py": first_words,
    "demo": demo,
    "images and two DataParallel checkpoints": prepare,
    "merge, evaluate, ONNX": merge,
    "prune, evaluate, ONNX": prune,
    "recipe, twice": recipes,
    "from_pretrained": load,
    "Hugging Face in and out": hugging_face,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reuse", metavar="PYTHON", help="interpreter whose installed packages are used")
    parser.add_argument("--epochs", type=int, default=15, help="training epochs of the demo's networks")
    parser.add_argument("--skip", action="append", default=[], choices=STEPS, help="a step to leave out, repeatable")
    parser.add_argument("--folder", type=Path, help="where to work, kept afterwards; default: a temporary folder")
    asked = parser.parse_args()
    folder = (asked.folder or Path(tempfile.mkdtemp(prefix="vfx-acceptance-"))).resolve()
    (folder / "work").mkdir(parents=True, exist_ok=True)
    trial = Trial(folder, asked.reuse, asked.epochs)
    for name, step in STEPS.items():
        if name in asked.skip:
            continue
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        step(trial)
        trial.seconds[name] = time.perf_counter() - start
    print("".join(f"{seconds:8.1f} s  {name}\n" for name, seconds in trial.seconds.items()))
    if asked.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
