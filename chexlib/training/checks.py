"""Checks of a description's fields when it is made: a refusal is a ConfigError that names whose field and its value."""

from __future__ import annotations

import math
from collections.abc import Iterable

from chexlib.errors import ConfigError


def is_amount(value) -> bool:
    """Whether a value is a finite number of 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def require_known(thing, **known) -> None:
    """Refuse a field whose value is not among those that are known for it."""
    for name, accepted in known.items():
        if (value := getattr(thing, name)) not in accepted:
            whose, these = type(thing).__name__.lower(), ", ".join(map(str, accepted))
            raise ConfigError(f"a {whose}'s {name}={value!r} is not known. Use {these}.")


def require_amounts(thing, *names: str) -> None:
    """Refuse a field that is no finite number of 0 or more."""
    for name in names:
        if not is_amount(value := getattr(thing, name)):
            whose = type(thing).__name__.lower()
            raise ConfigError(f"a {whose}'s {name}={value!r} is not accepted. Use a number of 0 or more.")


def rising(name: str, places) -> tuple[float, ...]:
    """The places as a tuple; a search among them is silently wrong where one does not lie above the one before."""
    found = tuple(places) if isinstance(places, Iterable) else (None,)
    if not all(map(is_amount, found)) or list(found) != sorted(set(found)):
        raise ConfigError(f"{name}={places!r} is not accepted. Use numbers of 0 or more, each above the one before.")
    return found
