"""Data shown to a person: what files, folders and columns are named is text there, never markup.

JupyterLab trusts the outputs of what it runs: a script in a caption would be executed. So notebooks
write texts with this module's `Markdown`, and tables that have a caption or a format with `styled`.
"""

from __future__ import annotations

import html
import re

import pandas as pd
from IPython import display
from pandas.io.formats.style import Styler

# Where a tag begins in HTML and Markdown, and where the target of a link or picture does. There an
# invisible sign (word joiner) is put between, which holds inside of code as well as outside.
_LIVE = re.compile(r"<(?=[A-Za-z/!?])|\](?=[(\[:])")


def inert(text: str) -> str:
    """Markdown in which nothing is a tag, a link or a picture, whatever names it has in it."""
    return _LIVE.sub("\\g<0>\u2060", text)


class Markdown(display.Markdown):
    """IPython's Markdown for texts that have names of data in them: headings, lists, tables, bold."""

    def __init__(self, text: str):
        super().__init__(inert(text))


class _Styled(Styler):
    """Escapes the caption; the cells and names of its table are escaped before."""

    def set_caption(self, caption: str) -> Styler:
        return super().set_caption(escaped(caption))


def escaped(value):
    """A text for HTML; anything else as it is."""
    return html.escape(value) if isinstance(value, str) else value


def styled(table: pd.DataFrame) -> Styler:
    """`table.style`, with every text of the table escaped, names of rows and columns too."""
    table = table.map(escaped).rename(index=escaped, columns=escaped)
    return _Styled(table.rename_axis(index=escaped, columns=escaped))
