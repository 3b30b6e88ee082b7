"""What a reader says of a cluster, and how a training is dealt out to one of its nodes."""

from __future__ import annotations

import re

from chexlib.errors import ConfigError

_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s+(\S.*)")


def read_quantities(text: str, *, like: str) -> list[float]:
    """The numbers of a text such as "48 cores, 300 W", in the order of the units in `like`.

    Parameters
    ----------
    text, like : str
        A number above 0 before each unit, commas between; both have the same units.

    Raises
    ------
    ConfigError
        A unit that is missing, unknown or there twice, or something that is no number above 0.

    Examples
    --------
    >>> read_quantities("300 W, 48 cores", like="40 cores, 250 W")
    [48.0, 300.0]
    """
    found = [_NUMBER.fullmatch(part.strip()) for part in text.split(",")]
    units = [_NUMBER.fullmatch(part.strip())[2] for part in like.split(",")]
    numbers = {match[2]: float(match[1]) for match in found if match}
    if sorted(match[2] if match else "" for match in found) != sorted(units) or not all(
        numbers.values()
    ):
        raise ConfigError(
            f"{text!r} is not accepted. Write it like {like!r}: these units, each with a number "
            "above 0."
        )
    return [numbers[unit] for unit in units]


def deal_out(cores: float, ranks: float) -> tuple[int, int]:
    """Threads of each rank of a node, and cores that it leaves to its communication: two, as the
    study did, or fewer.

    Raises
    ------
    ConfigError
        More ranks than cores, or no whole number of them.
    """
    if ranks % 1 or not 1 <= ranks <= cores:
        raise ConfigError(
            f"{ranks:g} ranks on a node of {cores:g} cores are not accepted. Use 1 to {cores:g}."
        )
    each = int(cores // ranks)
    spare = min(2, each - 1)
    return each - spare, spare
