"""Symmetries of public networks: are they captured, understood operator by operator, and true?

The papers' networks, every classification, segmentation and video network of torchvision, timm networks of different
families, and Hugging Face families from tiny configurations, all with random weights and images as small as each
network allows. For each one line: its groups and channels, how many groups lie inside the blocks of another (attention
heads, groups of a convolution), how many positions of parameter axes are pinned, operators without a rule, seconds that
capture and inference took (processor time on one thread, an upper bound where other processes ran), the largest
relative output error in float64 when every group goes through a random map of its class, and peak memory. A second
table has the classes: how many groups of each network may be permuted only, how many go through signs, scales,
orthogonal or any invertible maps, on all their sides at once, how many planes of rotary embeddings' queries and keys
may be turned (in so many attentions), and how many have a side with more freedom (a gain that takes a scale up), with
the seconds that classes took.

The error must stay below 1e-10 (lines without classes were measured with permutations alone); what a network itself
casts to float32 is computed in float64 for this. Networks of more than 400 million parameters give up the memory of
their weights (meta): they are captured and analysed, not verified. Each network runs in a process of its own.

Results go to ``benchmarks/results``: zoo.json and zoo.md, written after each network.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.fashion import RESULTS
from benchmarks.memory import peak_memory
from benchmarks.pairs_report import grid
from vfx.analyse.classes import Maps
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import verify
from vfx.api import trace
from vfx.files import write_atomic
from vfx.models import MODELS

EXACT = 1e-10
META = 400_000_000  # parameters
VOCABULARY = 61
SOURCES = ("vfx", "torchvision", "timm", "huggingface")
console = Console(stderr=True)
Timed = TypeVar("Timed")


@dataclass(frozen=True)
class Network:
    """One network: where it comes from, the side of its images, the length of its clips, its constructor's options."""

    source: str
    name: str
    side: int = 64
    frames: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        return BUILDERS[self.source](self).eval()

    def inputs(self) -> Any:
        if self.source == "huggingface":
            return HUGGING_FACE[self.name][1]()
        return torch.randn(2, 3, *([self.frames] if self.frames else []), self.side, self.side)


# the networks -------------------------------------------------------------------------------------------------------


def paper_networks() -> list[Network]:
    return [Network("vfx", name, 32) for name in MODELS if name.partition("_")[0] in ("vgg16", "resnet20", "vit")]


def _paper(network: Network) -> nn.Module:
    return MODELS[network.name]()


NO_INIT = {"init_weights": False}  # minutes of truncated normals that nothing here needs
_SIDES = {"inception_v3": 107, "maxvit_t": 224, "s3d": 224, "mvit_v1_b": 224, "mvit_v2_s": 224}
_FRAMES = {"s3d": 16, "mvit_v1_b": 16, "mvit_v2_s": 16, "swin3d_t": 4, "swin3d_s": 4, "swin3d_b": 4}


def torchvision_networks() -> list[Network]:
    import torchvision.models as zoo

    names = (name for module in (zoo, zoo.segmentation, zoo.video) for name in zoo.list_models(module=module))
    videos = set(zoo.list_models(module=zoo.video))
    return [_torchvision_network(name, name in videos) for name in names]


def _torchvision_network(name: str, video: bool) -> Network:
    side, options = _SIDES.get(name, 64), {}
    if name.startswith("vit_"):
        side = 56 if name.endswith("14") else 64
        options = {"image_size": side}
    elif name in ("googlenet", "inception_v3"):
        options = NO_INIT
    frames = _FRAMES.get(name, 8) if video else 0
    return Network("torchvision", name, side, frames, options)


def _torchvision(network: Network) -> nn.Module:
    import torchvision.models as zoo

    options = {"weights_backbone": None} if network.name in zoo.list_models(module=zoo.segmentation) else {}
    return zoo.get_model(network.name, weights=None, **options, **network.options)


# name -> side; below 0 the side is also the constructor's img_size
_TIMM = {
    "deit_tiny_patch16_224": -64,
    "xcit_nano_12_p16_224": -64,
    "mixer_s32_224": -224,
    "nf_resnet50": 64,
    "beit_base_patch16_224": -64,
    "cait_xxs24_224": -64,
    "coat_tiny": -64,
    "coatnet_0_224": -64,
    "convmixer_768_32": 64,
    "convnext_atto": 64,
    "crossvit_9_240": -240,
    "cspresnet50": 64,
    "davit_tiny": 64,
    "dpn48b": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientvit_b0": 64,
    "efficientvit_m0": 224,
    "eva02_tiny_patch14_224": -56,
    "ghostnet_050": 64,
    "gmlp_ti16_224": -64,
    "hgnetv2_b0": 64,
    "hrnet_w18_small": 64,
    "inception_v4": 160,
    "levit_128s": 224,
    "maxvit_pico_rw_256": -64,
    "mobilevit_xxs": 64,
    "mobileone_s0": 64,
    "mvitv2_tiny": -64,
    "nfnet_l0": 64,
    "pit_ti_224": -64,
    "poolformer_s12": 64,
    "pvt_v2_b0": 64,
    "regnetz_005": 64,
    "res2net50_26w_4s": 64,
    "resmlp_12_224": -64,
    "resnest14d": 64,
    "rexnet_100": 64,
    "repvgg_a0": 64,
    "sequencer2d_s": -64,
    "skresnet18": 64,
    "swinv2_tiny_window8_256": -64,
    "tiny_vit_5m_224": 224,
    "tnt_s_patch16_224": -64,
    "twins_svt_small": -64,
    "vovnet39a": 64,
    "xception41": 64,
}


def timm_networks() -> list[Network]:
    return [
        Network("timm", name, abs(side), options={"img_size": -side} if side < 0 else {})
        for name, side in _TIMM.items()
    ]


def _timm(network: Network) -> nn.Module:
    import timm

    return timm.create_model(network.name, pretrained=False, **network.options)


def _tokens(length: int = 12) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = _SMALL | {"num_key_value_heads": 2, "intermediate_size": 80, "use_cache": False}
_BERT = _SMALL | {"intermediate_size": 96}
_VIT = {k: _BERT[k] for k in _BERT if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "use_cache": False}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
_T5 = {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 48, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
_BART = {"vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "use_cache": False}
_BART |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
_BART |= {f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")}

# name -> class, configuration and inputs
HUGGING_FACE: dict[str, tuple[tuple[str, str, dict[str, Any]], Callable[[], Any]]] = {
    "bert": (("BertModel", "BertConfig", _BERT), _text),
    "gpt2": (("GPT2LMHeadModel", "GPT2Config", _GPT2), _text),
    "llama": (("LlamaForCausalLM", "LlamaConfig", _GQA), _text),
    "t5": (
        ("T5ForConditionalGeneration", "T5Config", _T5 | {"use_cache": False}),
        lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens(7)},
    ),
    "distilbert": (("DistilBertModel", "DistilBertConfig", _DISTILBERT), _text),
    "vit": (("ViTForImageClassification", "ViTConfig", _VIT), lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "bart": (
        ("BartForConditionalGeneration", "BartConfig", _BART),
        lambda: _text() | {"decoder_input_ids": _tokens(7)},
    ),
    "mistral": (("MistralForCausalLM", "MistralConfig", _GQA), _text),
    "qwen2": (("Qwen2ForCausalLM", "Qwen2Config", _GQA), _text),
}


def hugging_face_networks() -> list[Network]:
    return [Network("huggingface", name) for name in HUGGING_FACE]


def _hugging_face(network: Network) -> nn.Module:
    import transformers

    model, config, options = HUGGING_FACE[network.name][0]
    return getattr(transformers, model)(getattr(transformers, config)(**options))


BUILDERS: dict[str, Callable[[Network], nn.Module]] = {
    "vfx": _paper,
    "torchvision": _torchvision,
    "timm": _timm,
    "huggingface": _hugging_face,
}


def networks() -> list[Network]:
    return [*paper_networks(), *torchvision_networks(), *timm_networks(), *hugging_face_networks()]


# measuring ----------------------------------------------------------------------------------------------------------


def measure(network: Network, threads: int = 1) -> dict[str, Any]:
    """One network's line; runs in its own process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, meta = _built(network)
    inputs = network.inputs()
    before = peak_memory()
    program, capture_seconds = _timed(lambda: trace(model, inputs.to("meta") if meta else inputs))
    facts, seconds = _timed(lambda: symmetry(program))
    _, class_seconds = _timed(lambda: facts.classes)
    line = describe(facts) | {"capture_seconds": capture_seconds, "inference_seconds": seconds}
    line |= {"class_seconds": class_seconds}
    error, verify_seconds = (None, 0.0) if meta else _timed(lambda: verify(facts))
    return line | {
        "verify_error": error,
        "verify_seconds": verify_seconds,
        "peak_mib_before": before,
        "peak_mib": peak_memory(),
    }


def _built(network: Network) -> tuple[nn.Module, bool]:
    """The network, and whether it is so large that its weights were given up."""
    model = network.build()
    large = sum(parameter.numel() for parameter in model.parameters()) > META
    return model.to("meta") if large else model, large


def _timed(run: Callable[[], Timed]) -> tuple[Timed, float]:
    start = time.process_time()
    result = run()
    return result, round(time.process_time() - start, 3)


def describe(facts: Symmetry) -> dict[str, Any]:
    """What was found, what is pinned and why."""
    reasons: Counter[str] = Counter()
    for pin in facts.pinned:
        reasons[pin.reason] += pin.count
    return {
        "groups": len(facts.groups),
        "channels": facts.channels,
        "inside_blocks": sum(group.parent is not None for group in facts.groups),
        "pinned": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "unknown": {name: len(nodes) for name, nodes in facts.unknown_ops.items()},
        "kinds": {kind.title: count for kind, count in Counter(group.kind for group in facts.moving).items()},
        "richer_sides": sum(
            any(side.members and side.kind & ~group.kind for side in group.sides) for group in facts.groups
        ),
    }


def passes(line: dict[str, Any]) -> bool:
    """Captured, every operator known, and the groups proved."""
    if "failure" in line or line["unknown"]:
        return False
    return line["verify_error"] is None or line["verify_error"] <= EXACT


# reporting ----------------------------------------------------------------------------------------------------------

HEAD = [
    "network",
    "groups / channels",
    "in blocks",
    "pinned",
    "unknown",
    "capture s",
    "inference s",
    "error",
    "peak MiB",
]


def markdown(results: dict[str, dict[str, Any]]) -> str:
    text = inspect.cleandoc(__doc__ or "").partition("\n\n")[2].rpartition(" Each network")[0]
    good = sum(map(passes, results.values()))
    lines = ["# Symmetries of public networks", "", text, "", f"{good} of {len(results)} networks measured pass.", ""]
    for source in SOURCES:
        rows = [_row(key, line) for key, line in results.items() if key.startswith(f"{source}/")]
        if rows:
            lines += [f"## {source}", "", *grid(HEAD, rows), ""]
    lines += _classes(results)
    failures = [f"- {key}: {_why(line)}" for key, line in results.items() if not passes(line)]
    return "\n".join([*lines, "## Failures", "", *(failures or ["None."]), ""])


def _classes(results: dict[str, dict[str, Any]]) -> list[str]:
    """The number of groups of each class, network by network."""
    rows = [
        [
            key.partition("/")[2],
            *(str(line["kinds"].get(kind.title, 0)) for kind in Maps.__members__.values()),
            str(line["richer_sides"]),
            _seconds(line, "class_seconds", 2),
        ]
        for key, line in results.items()
        if "kinds" in line
    ]
    titles = [kind.title for kind in Maps.__members__.values()]
    head = ["network", *titles, "a side with more", "classes s"]
    return ["## Classes", "", *grid(head, rows), ""] if rows else []


def _row(key: str, line: dict[str, Any]) -> list[str]:
    name = key.partition("/")[2]
    if "failure" in line:
        return [name, "failed", *[""] * (len(HEAD) - 2)]
    error = "meta" if line["verify_error"] is None else f"{line['verify_error']:.0e}"
    return [
        name,
        f"{line['groups']} / {line['channels']:,}",
        str(line["inside_blocks"]),
        f"{line['pinned']:,}",
        str(sum(line["unknown"].values())),
        _seconds(line, "capture_seconds", 1),
        _seconds(line, "inference_seconds", 2),
        error,
        str(line["peak_mib"]),
    ]


def _seconds(line: dict[str, Any], name: str, digits: int) -> str:
    """A time, or a dash where it was not measured on code as fast as today's."""
    return f"{line[name]:.{digits}f}" if name in line else "–"


def _why(line: dict[str, Any]) -> str:
    if "failure" in line:
        return line["failure"]
    if line["unknown"]:
        return f"no rule for {', '.join(line['unknown'])}"
    return f"error {line['verify_error']:.1e}"


def summary(key: str, line: dict[str, Any]) -> str:
    if "failure" in line:
        return f"[red]{key}[/]: {line['failure']}"
    _, shape, blocks, pinned, unknown, capture, inference, error, peak = _row(key, line)
    colour = "green" if passes(line) else "red"
    return (
        f"[{colour}]{key}[/]: {shape}, {blocks} in blocks, pinned {pinned}, unknown {unknown}, "
        f"capture {capture} s, inference {inference} s, error {error}, {peak} MiB"
    )


# running ------------------------------------------------------------------------------------------------------------


def main(
    network: Annotated[list[str] | None, typer.Option(help="Only this network, measured anew (repeatable).")] = None,
    only: Annotated[str | None, typer.Option(help="vfx, torchvision, timm or huggingface.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many networks.")] = None,
    output: Annotated[Path, typer.Option(help="Folder the results are written to.")] = RESULTS,
    fresh: Annotated[bool, typer.Option(help="Measure again what the results hold already.")] = False,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Capture, analyse and verify public networks; a run that was stopped goes on where it was."""
    if only is not None and only not in SOURCES:
        raise typer.BadParameter(f"no source {only!r}; there are {', '.join(SOURCES)}")
    known = {f"{n.source}/{n.name}": n for n in networks()}
    unknown = sorted(set(network or ()) - {n.name for n in known.values()})
    if unknown:
        raise typer.BadParameter(f"no network {unknown[0]!r}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "zoo.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    chosen = {k: n for k, n in known.items() if only in (None, n.source) and (not network or n.name in network)}
    missing = {k: n for k, n in chosen.items() if fresh or network or "kinds" not in results.get(k, ())}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for key, one in progress.track(list(missing.items())[:limit], description="networks"):
            results[key] = isolated(one, threads)
            progress.console.print(summary(key, results[key]), highlight=False)
            results = {k: results[k] for k in known if k in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(output / "zoo.md", markdown(results))


def isolated(network: Network, threads: int) -> dict[str, Any]:
    """Measure in a fresh process; what goes wrong there is part of the result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, network, threads).result()
        except Exception as error:
            return {"failure": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


if __name__ == "__main__":
    typer.run(main)
