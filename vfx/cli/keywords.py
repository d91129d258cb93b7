"""Options of a command made from the keywords of the call that it stands for (``vfx.options``)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from vfx.cli.inputs import budget_of, cut_of, floats, optional, sparsity_of, widths_of
from vfx.cli.names import choices, names_in
from vfx.errors import ArgumentError
from vfx.options import Keyword, Kind, Text, keywords

DATA = (
    "digits, fashion-mnist, mnist:DIR, cifar10:DIR, cifar100:DIR, folder:DIR (images in a folder for each class), "
    "text:FILE, an .npz, .npy, .safetensors or .pt file (arrays, by the names of keyword arguments), or "
    "file.py:loader."
)
Given = dict[str, Any]  # a command's parameter of this type stands for all options that are made for it


class Written(NamedTuple):
    """How a kind of keyword is written: its type for typer, its default as text, and what a text stands for."""

    type: Any
    default: Callable[[Any], Any]
    value: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _left_out(default: Any) -> Any:
    return None


KINDS: dict[Kind, Written] = {
    "text": Written(str, lambda default: "none" if default is None else default, _same),
    "name": Written(str, lambda default: "none" if default is None else default, optional),
    "maybe": Written(str | None, _same, _same),
    "cut": Written(str, str, cut_of),
    "number": Written(int, _same, _same),
    "real": Written(float, _same, _same),
    "count": Written(int | None, _same, _same),
    "widths": Written(str | None, _left_out, widths_of),
    "flag": Written(bool, _same, _same),
    "numbers": Written(str | None, _left_out, floats),
    "texts": Written(list[str] | None, _left_out, _same),
    "budget": Written(str | None, _left_out, budget_of),
    "shares": Written(list[str] | None, _left_out, sparsity_of),
    "data": Written(str | None, _left_out, _same),
    "file": Written(Path | None, _left_out, _same),
    "files": Written(list[Path] | None, _left_out, _same),
}


def spoken(options: type) -> dict[str, tuple[Keyword, Text]]:
    """The keywords that can be said on a command line."""
    return {name: (keyword, keyword.text) for name, keyword in keywords(options).items() if keyword.text is not None}


def with_keywords(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each keyword of ``options``; it gets them in its parameter ``given``, by name."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        made = [_parameter(keyword, text) for keyword, text in spoken(options).values()]
        declared = inspect.signature(function, eval_str=True).parameters
        parameters = [p for name, parameter in declared.items() for p in (made if name == "given" else [parameter])]

        @functools.wraps(function)
        def command(**named: Any) -> None:
            given = {parameter.name: named.pop(parameter.name) for parameter in made}
            _check(options, given)
            function(given=given, **named)

        keyword_only = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([parameter.replace(kind=keyword_only) for parameter in parameters])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def option_of(options: type, name: str) -> Any:
    """The typer option of one keyword."""
    keyword, text = spoken(options)[name]
    return typer.Option(*text.flags, help=_help(keyword, text))


def _parameter(keyword: Keyword, text: Text) -> inspect.Parameter:
    written = KINDS[text.kind]
    annotation = Annotated[written.type, typer.Option(*text.flags, help=_help(keyword, text))]  # type: ignore[name-defined]
    return inspect.Parameter(
        keyword.name, inspect.Parameter.KEYWORD_ONLY, default=written.default(keyword.default), annotation=annotation
    )  # fmt: skip


def _help(keyword: Keyword, text: Text) -> str:
    return keyword.help.format(data=DATA) or choices(*_names(text))


def _names(text: Text) -> tuple[str, ...]:
    return (*text.names, *(names_in(*text.catalogue) if text.catalogue else ()))


def _check(options: type, given: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a name that a catalogue does not hold, before anything heavy is imported."""
    for name, (_, text) in spoken(options).items():
        accepted = _names(text)
        if accepted and given[name].lower() not in accepted:
            option = text.flags[0] if text.flags else f"--{name.replace('_', '-')}"
            raise ArgumentError(f"{option} {given[name]!r} is unknown; choose one of {', '.join(accepted)}")


def values(options: type, given: Mapping[str, Any], **made: Any) -> dict[str, Any]:
    """The keywords as the call takes them; ``made`` are those that a command makes itself.

    What can be given several times and was not is left to the call.
    """
    written = {name: KINDS[text.kind].value(given[name]) for name, (_, text) in spoken(options).items()}
    repeated = {name for name, (_, text) in spoken(options).items() if text.kind in ("texts", "files")}
    return {name: value for name, value in written.items() if value or name not in repeated} | made
