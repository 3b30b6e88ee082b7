"""Exceptions that chexlib raises, and the one line that tells an error.

A message says what is wrong, the value, what is accepted and the next step.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# What a file or the machine can raise at any place. The command line tells them in one line too.
FAULTS = (OSError, EOFError, MemoryError, RecursionError)


class ChexlibError(Exception):
    """Base of every error that chexlib raises on purpose; its text is one line."""

    def __str__(self):
        # Words of libraries in it may have several.
        return " ".join(super().__str__().splitlines())


class DataError(ChexlibError):
    """A data folder, table or image that cannot be used as it is."""


class ConfigError(ChexlibError, ValueError):
    """A setting outside what is accepted."""


class DivergedError(ConfigError):
    """A training whose scores are no longer finite."""


class ClusterError(ChexlibError):
    """MPI engines that could not be started, or that failed while they worked."""


class WeightsError(ChexlibError):
    """Weights that do not fit the model they are meant for."""


_ROOM = "Make room, and repeat the command."
_MINE = "Name a place that you may use, or change its permissions."
# What helps, by the number of an OSError; any other asks for where it was.
_STEPS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), and repeat the command.",
    errno.EACCES: _MINE,
    errno.EPERM: _MINE,
    errno.EROFS: _MINE,
    errno.EIO: "Check this disk, or use another.",
    errno.ENOENT: "Check the name.",
    errno.ENOTDIR: "Check the name.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.ENXIO: "Name a regular file.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n), and repeat the command.",
    errno.ENOMEM: "Use less at a time, or a machine with more memory.",
}
_DEBUG = "Repeat the command with --debug to see where."


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters, without the file of an OSError."""
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint for a message, such as " Did you mean 'epochs'?"; empty where no name is similar."""
    near = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def printable(text: str) -> str:
    """A text in which all but line ends can be shown: what steers a terminal, and bytes of a name
    that are no UTF-8, are escaped.
    """
    shown = (
        letter
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return "".join(shown)


def one_line(error: BaseException | str) -> str:
    """An error's text, or a text, as one line; errors of files and memory get the next step."""
    said = " ".join(str(error).split())
    if isinstance(error, OSError):
        what = f"{error.filename} cannot be used" if error.filename else "reading or writing failed"
        said = f"{what} ({error.strerror or said}). {_STEPS.get(error.errno, _DEBUG)}"
    elif isinstance(error, MemoryError):
        said = f"the memory is not enough ({said or 'none is left'}). {_STEPS[errno.ENOMEM]}"
    elif isinstance(error, RecursionError):
        said = f"something in the input is nested too deeply ({said}). {_DEBUG}"
    elif isinstance(error, EOFError):
        said = f"a file ends too early ({said or 'end of file'}). {_DEBUG}"
    elif not isinstance(error, ChexlibError | str):
        said = f"{type(error).__name__}: {said}"
    return printable(" ".join(said.split()))
