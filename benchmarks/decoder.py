"""A Hugging Face decoder in shards: pruned at 50 % by Wanda with reconstruction and written back, and two merged.

Weights are random, in bfloat16, as ``transformers`` writes them. Each call runs in a process of its own, which reads
the shards and ends with the shards of the result. ``peak`` is the largest resident memory of that process, imports,
inputs and result among it. Pruning is calibrated on 32 sequences of 256 random tokens. Asked of the 1.1 B decoder:
pruning within 12 GB and two hours on two cores, merging by weights (permutations) within 16 GB. Sizes that are not in
the table were not measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.fashion import RESULTS
from benchmarks.memory import peak_memory
from benchmarks.options import Output
from vfx.api import merge, prune
from vfx.emit.pretrained import save_pretrained
from vfx.files import write_atomic

SHARD = 500 << 20  # bytes
VOCABULARY, SEQUENCES = 32_000, 32
TOKENS = {"prune": 256, "merge": 64}  # of a sequence
SIZES: dict[str, dict[str, int]] = {  # of Llama's configuration
    "39 M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8},
    "106 M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "322 M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
    "1.1 B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
ASKED = {"prune": 12.0, "merge": 16.0}  # GB, of the largest
HEAD = (
    "| decoder | parameters | call | peak, GB | peak, models | wall, min | processor, min | load |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def decoder(size: str) -> nn.Module:
    """A decoder with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **SIZES[size])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def written(size: str, folder: Path, seed: int) -> Path:
    """A folder with the shards of a decoder."""
    torch.manual_seed(seed)
    decoder(size).save_pretrained(folder, max_shard_size=SHARD)  # type: ignore[operator]
    return folder


def read(folder: Path) -> nn.Module:
    """The decoder in a folder, made on meta and given the tensors of the shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16).eval()


def tokens(sequences: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0))


def measure(call: str, folders: list[Path], out: Path) -> dict[str, Any]:
    """One call in this process."""
    started, clock = time.perf_counter(), time.process_time()
    models = [read(folder) for folder in folders]
    x, quiet = {"input_ids": tokens(1, TOKENS[call])}, {"progress": False}
    if call == "prune":
        options: dict[str, Any] = {"sparsity": 0.5, "score": "wanda", "solve": "least_squares", "normalize": None}
        data = tokens(SEQUENCES, TOKENS[call]).split(1)
        result = prune(models[0], x, data=data, checkpoint=out.with_name("checkpoint"), **options, **quiet)
    else:
        result = merge(models, x, match="weight", classes="permutation", **quiet)
    save_pretrained(result, out, shard_size=SHARD)
    linear = [m.weight for name, m in result.module.named_modules() if isinstance(m, nn.Linear) and "head" not in name]
    return {
        "call": call,
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "model_gb": sum(p.nbytes for p in models[0].parameters()) / 1e9,
        "peak_gb": peak_memory() * 2**20 / 1e9,
        "wall_min": (time.perf_counter() - started) / 60,
        "processor_min": (time.process_time() - clock) / 60,
        "load": os.getloadavg()[0],
        "zeros": sum(int((w == 0).sum()) for w in linear) / sum(w.numel() for w in linear),
        "shards": len(list(out.glob("*.safetensors"))),
        "stages": {name: round(float(took), 1) for name, took in result.report.seconds.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The table, misses in bold."""
    text = [(__doc__ or "").strip(), "", "Command: `python -m benchmarks.decoder`.", "", *HEAD]
    for name, row in rows.items():
        size, call = name.split(", ")
        peak = f"{row['peak_gb']:.2f}" if row["peak_gb"] <= ASKED[call] else f"**{row['peak_gb']:.2f}**"
        cells = [size, f"{row['parameters']:,}", call, peak, f"{row['peak_gb'] / row['model_gb']:.1f}"]
        cells += [f"{row[key]:.1f}" for key in ("wall_min", "processor_min", "load")]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main(
    size: Annotated[list[str] | None, typer.Option(help="Only these decoders (may be repeated).")] = None,
    call: Annotated[list[str] | None, typer.Option(help="prune or merge; default: both.")] = None,
    output: Output = RESULTS,
    alone: Annotated[Path | None, typer.Option(help="Measure the one call named here on the decoders in it.")] = None,
) -> None:
    """Measure each call in a process of its own, and write decoder.json and decoder.md after each."""
    if alone is not None:
        (only,) = call or ()
        folders = [alone / name for name in ("a", "b")[: 2 if only == "merge" else 1]]
        print(json.dumps(measure(only, folders, alone / only)))
        return
    path = output / "decoder.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    for of_size in size or SIZES:
        with tempfile.TemporaryDirectory() as work:
            for index, name in enumerate(("a", "b")):
                written(of_size, Path(work) / name, index)
            for of_call in call or ASKED:
                command = [sys.executable, "-W", "ignore", "-m", "benchmarks.decoder", "--alone", work]
                done = subprocess.run([*command, "--call", of_call], stdout=subprocess.PIPE, check=True, text=True)
                row = rows[f"{of_size}, {of_call}"] = json.loads(done.stdout.splitlines()[-1])
                Console(stderr=True).print(row)
                output.mkdir(parents=True, exist_ok=True)
                write_atomic(path, json.dumps(rows, indent=1) + "\n")
                write_atomic(output / "decoder.md", page(rows))


if __name__ == "__main__":
    typer.run(main)
