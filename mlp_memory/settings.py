"""Checks of what a user may set: each raises one line that names the setting and its value."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlp_memory.artifacts import UserError


def _name(config: Any, field: str) -> str:
    """ "pretrain.steps" of a PretrainConfig's field."""
    return f"{type(config).__name__.removesuffix('Config').lower()}.{field}"


def check_whole(config: Any, least: Mapping[str, int]) -> None:
    """Fields that must be whole numbers, each with the least it may be."""
    for field, low in least.items():
        value = getattr(config, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise UserError(f"{_name(config, field)} = {value!r}: give a whole number, {low} or more")


def check_number(config: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Fields that must be numbers in [low, high), each with its bounds."""
    for field, (low, high) in bounds.items():
        value = getattr(config, field)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value < high:
            limit = f"below {high:g}" if high != float("inf") else "finite"
            raise UserError(f"{_name(config, field)} = {value!r}: give a number, {low:g} or more and {limit}")


def check_positive(config: Any, *fields: str) -> None:
    """Fields that must be finite numbers above 0."""
    for field in fields:
        value = getattr(config, field)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 < value < float("inf"):
            raise UserError(f"{_name(config, field)} = {value!r}: give a number above 0")


def check_choice(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Fields that must be one of a few words."""
    for field, words in choices.items():
        value = getattr(config, field)
        if value not in words:
            raise UserError(f"{_name(config, field)} = {value!r}: use one of {', '.join(words)}")


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """What to tell of an unknown name: the known one most like it, or else `otherwise`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise or "there are: " + ", ".join(known)
