"""What an engine does for `Engines.run`."""

from __future__ import annotations

import logging
from collections.abc import Callable


class _Kept(logging.StreamHandler):
    """Keeps what chexlib logs, and prints it."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.name, record.levelno, record.getMessage()))
        super().emit(record)


def call(function: Callable, args: tuple, kwargs: dict, live: bool) -> tuple:
    """What the function returned, and a (logger, level, text) for each line that chexlib logged
    meanwhile.
    """
    from ipyparallel.datapub import publish_data

    if live:
        kwargs = {**kwargs, "report": publish_data}
    logger, kept = logging.getLogger("chexlib"), _Kept()
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    try:
        return function(*args, **kwargs), kept.lines
    finally:
        logger.removeHandler(kept)
