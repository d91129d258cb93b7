"""Sizes that depend on the inputs: a grammar of numbers, symbols, arithmetic and comparisons.

torch hands these texts to sympy, which evaluates them as Python. Only what the grammar knows is let through, in the
grammar's own writing; numbers, powers and lengths are bounded so that no text takes long to evaluate.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection
from typing import TypeGuard

from vfx.errors import CheckpointError

SYMBOL = re.compile(r"(s|u|zf|zuf)[0-9]{1,4}", re.ASCII)
_FLOAT = re.compile(r"-?[0-9]{1,320}(\.[0-9]{1,60})?(e[+-]?[0-9]{1,3})?", re.ASCII)
_LONGEST = 20_000  # characters
_DEEPEST = 60  # nested calls
_LARGEST = 1 << 63
_LARGEST_POWER = 64
_MOST_COMPARED = 24
_MOST_ROUNDINGS = 6
_MOST_TERMS = 100  # of a product that is multiplied out, as sympy does to divide
_EXTREMA = ("Max", "Min")
_ROUNDINGS = ("floor", "ceiling")
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift", "RShift")
_SUMS, _PRODUCTS = ("Add", "Sub"), ("Mul", "Mult", "Div")
_FUNCTIONS = frozenset({
    "Add", "Mul", "Max", "Min", "Abs", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv",
    "FloatTrueDiv", "IntTrueDiv", "TruncToInt", "TruncToFloat", "CeilToInt", "FloorToInt", "RoundToInt", "RoundDecimal",
    "ToFloat", "Identity", "Where", "floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality",
    "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan", "And", "Or", "Not",
    "IsNonOverlappingAndDenseIndicator", *_POWERS,
})  # fmt: skip
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_TRUTHS = ("true", "false", "True", "False")


def checked_expression(text: str) -> str:
    """The expression in the grammar's own writing. Raises CheckpointError for everything that it does not know."""
    try:
        if len(text) > _LONGEST:
            raise ValueError("it is too long")
        tree = ast.parse(text.strip(), mode="eval").body
        _check(tree, _DEEPEST)
        _terms(tree)
        return ast.unparse(tree)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"size {text[:80]!r} is no expression of integers and symbols: {error}") from error


def _check(node: ast.expr, depth: int) -> None:
    if depth == 0:
        raise ValueError("it is nested too deeply")
    if isinstance(node, ast.Call):
        _check_call(node, depth)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        if isinstance(node.op, ast.Pow):
            _check_power(node.left, node.right)
        _check(node.left, depth - 1)
        _check(node.right, depth - 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        _check(node.operand, depth - 1)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], _COMPARISONS):
        _check(node.left, depth - 1)
        _check(node.comparators[0], depth - 1)
    elif isinstance(node, ast.Name):
        if not (SYMBOL.fullmatch(node.id) or node.id in _TRUTHS):
            raise ValueError(f"{node.id!r} is no symbol")
    elif not _is_number(node):
        raise ValueError(f"{type(node).__name__} does not belong there")


def _check_call(node: ast.Call, depth: int) -> None:
    name = node.func.id if isinstance(node.func, ast.Name) else "?"
    if name == "Symbol":
        _check_symbol(node)
    elif name == "Float":
        _check_float(node)
    elif name in ("Integer", "Rational"):
        if node.keywords or not all(_is_integer(argument) for argument in node.args) or not 1 <= len(node.args) <= 2:
            raise ValueError(f"{name} takes integers")
    elif name in _FUNCTIONS and not node.keywords:
        if name in _POWERS:
            _check_power(*node.args)
        if name in _EXTREMA and sum(len(part.args) for part in _calls_in(node, _EXTREMA)) > _MOST_COMPARED:
            raise ValueError(f"more than {_MOST_COMPARED} terms of one Max or Min")  # each is compared with each
        if name in _ROUNDINGS and len(_calls_in(node, _ROUNDINGS)) > _MOST_ROUNDINGS:
            raise ValueError(f"more than {_MOST_ROUNDINGS} floors of floors")  # each evaluates those in it anew
        for argument in node.args:
            _check(argument, depth - 1)
    else:
        raise ValueError(f"{name!r} is no function of sizes")


def _check_symbol(node: ast.Call) -> None:
    named = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
    if len(named) != 1 or not isinstance(named[0], str) or not SYMBOL.fullmatch(named[0]):
        raise ValueError("Symbol takes a symbol's name")
    for keyword in node.keywords:
        is_plain = isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
        if not is_plain or keyword.arg not in ("integer", "positive", "nonnegative", "real", "negative", "nonzero"):
            raise ValueError(f"{keyword.arg!r} is no property of a symbol")


def _check_float(node: ast.Call) -> None:
    values = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
    if len(values) != 1 or not isinstance(values[0], str) or not _FLOAT.fullmatch(values[0]):
        raise ValueError("Float takes a decimal number")
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg != "precision" or type(value) is not int or not 1 <= value <= 64:
            raise ValueError("Float takes a precision of at most 64 bits")


def _check_power(*operands: ast.expr) -> None:
    """An exponent is one small number or one symbol, and a power's base holds no other power: values stay small."""
    if len(operands) != 2:
        raise ValueError("a power has a base and an exponent")
    base, exponent = operands
    if not _is_small(exponent):
        raise ValueError(f"an exponent is a symbol or a number of at most {_LARGEST_POWER}")
    if any(_is_power(part) for part in ast.walk(base)):
        raise ValueError("a power of a power")


def _terms(node: ast.expr) -> int:
    """How many terms an expression has at most once it is multiplied out. Raises ValueError for too many."""
    operator, operands = _operation(node)
    counts = [_terms(operand) for operand in operands]
    if operator in _SUMS:
        multiplied, count = sum(count for count in counts if count > 1), sum(counts)
    elif operator in _PRODUCTS:
        multiplied = count = math.prod(counts)
    elif operator in _POWERS:
        exponent = _exponent(operands[1])
        multiplied = count = math.comb(counts[0] + exponent - 1, exponent)
    else:
        return 1
    if multiplied > _MOST_TERMS:
        raise ValueError(f"more than {_MOST_TERMS} terms once it is multiplied out")
    return count


def _operation(node: ast.expr) -> tuple[str, list[ast.expr]]:
    if isinstance(node, ast.BinOp):
        return type(node.op).__name__, [node.left, node.right]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id, node.args
    if isinstance(node, ast.UnaryOp):
        return "Add", [node.operand]
    return "", [node.left, *node.comparators] if isinstance(node, ast.Compare) else []


def _exponent(node: ast.expr) -> int:
    """The size of a number that is an exponent; powers to a symbol are not multiplied out."""
    numbers = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    named = isinstance(node, ast.Name) or _calls(node, ("Symbol",))
    return 1 if named else math.ceil(abs(float(str(numbers[0]))))


def _is_small(exponent: ast.expr) -> bool:
    if isinstance(exponent, ast.Name):
        return True
    if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name):
        name, values = exponent.func.id, exponent.args
        if name == "Float" and len(values) == 1 and isinstance(values[0], ast.Constant):
            return abs(float(values[0].value)) <= _LARGEST_POWER  # type: ignore[arg-type]
        return name == "Symbol" or (name == "Integer" and all(_is_integer(x, _LARGEST_POWER) for x in values))
    if isinstance(exponent, ast.Constant) and type(exponent.value) is float:
        return abs(exponent.value) <= _LARGEST_POWER
    return _is_integer(exponent, _LARGEST_POWER)


def _is_power(node: ast.AST) -> bool:
    return _calls(node, _POWERS) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow))


def _calls(node: ast.AST, names: Collection[str]) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _calls_in(node: ast.AST, names: Collection[str]) -> list[ast.Call]:
    return [part for part in ast.walk(node) if _calls(part, names)]


def _is_integer(node: ast.expr, largest: int = _LARGEST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) <= largest


def _is_number(node: ast.expr) -> bool:
    return _is_integer(node) or (isinstance(node, ast.Constant) and type(node.value) in (float, bool))
