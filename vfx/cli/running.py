"""``vfx run``: a recipe carried out into a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vfx.cli.app import app
from vfx.cli.early import check_models, check_network
from vfx.cli.inputs import data_of, examples_of, load_all
from vfx.cli.results import evaluated, put
from vfx.files import check_writable, make_folder
from vfx.progress import stage

SEEN = 512  # samples, at most, on which layers are held against the edges'


@app.command()
def run(
    recipe: Annotated[
        Path, typer.Argument(help="TOML or YAML file: action, model, weights, data, options; see vfx/cli.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory of the result: network, recipe, report, page and card.")],
) -> None:
    """Carry out a recipe; running it again gives the same bytes."""
    from vfx.cli.recipe import read_recipe, resolved, values

    asked = read_recipe(recipe)
    check_models(asked.models, [Path(name) for name in asked.weights])
    check_network(None, map(Path, asked.weights), asked.input)
    from vfx import api
    from vfx.cli.toml import toml_of
    from vfx.emit.pretrained import save_pretrained
    from vfx.emit.provenance import digests
    from vfx.pages.run import Run, card, page
    from vfx.statistics.data import reusable

    function = getattr(api, asked.action)
    whole = resolved(asked, str(recipe))
    make_folder(out)
    for name in ("recipe.toml", "report.json", "report.html", "README.md"):
        check_writable(out / name)
    files = [Path(name) for name in whole.weights]
    networks, model = load_all(files, whole.models, [], whole.entry), whole.models[0]
    examples = examples_of(whole.input, model)
    options = values(
        whole,
        lambda paths: load_all([Path(path) for path in paths], model, [], whole.entry),
        lambda source: data_of(source, examples, model),
    )
    judging = data_of(whole.evaluate, examples, model, "test")
    given: Any = networks if asked.action == "merge" else _single(networks, asked.action)
    data = reusable(data_of(whole.data, examples, model))
    result = function(given, examples, data=data, **options)
    evaluation = evaluated(networks, result, examples, judging, files)
    print(result.report)
    if evaluation is not None:
        print(evaluation)
    document = toml_of(whole.to_dict())
    origin: dict[str, Any] = {"recipe": document, "edges": digests(files)}
    print(f"wrote {save_pretrained(result, out, model=model, origin=origin)}")
    put(out / "recipe.toml", document)
    facts = {name: value for name, value in result.report.to_dict().items() if name != "seconds"}
    if evaluation is not None:
        rows = [{k: v for k, v in row.items() if k != "latency"} for row in evaluation.to_dict()["networks"]]
        facts["evaluation"] = evaluation.to_dict() | {"networks": rows}  # without times, which differ from run to run
    if asked.action == "merge" and data is not None and "edge" not in facts:
        facts["diagnosis"] = _diagnosis(result, networks, data, options)
    text = json.dumps(facts, indent=2, default=str) + "\n"
    put(out / "report.json", text)
    done = Run(json.loads(text), whole.to_dict(), origin["edges"])
    put(out / "report.html", page(done))
    put(out / "README.md", card(done))


def _diagnosis(result: Any, networks: list[Any], data: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What each layer hands on beside the edges' on some of the data, and the verdict; or why that cannot be seen."""
    from vfx.diagnosis.diagnose import diagnose
    from vfx.errors import VfxError

    stage("diagnosis")
    samples = min(options["max_samples"] or SEEN, SEEN)
    try:
        diagnosis = diagnose(result, networks, data=data, max_samples=samples, device=options["device"], progress=False)
    except VfxError as error:  # heads of several shapes, layers of other names: the merge stands nevertheless
        return {"text": f"Layers were not held against the edges': {error}"}
    return {"text": f"On {diagnosis.samples} samples, {diagnosis.verdict}", "rows": diagnosis.records()}


def _single(networks: list[Any], action: str) -> Any:
    from vfx.errors import ArgumentError

    if len(networks) != 1:
        raise ArgumentError(f"{action} takes one network, the recipe names {len(networks)}")
    return networks[0]
