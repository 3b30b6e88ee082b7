"""Live progress of a training: lines in a log, or bar, plot and Stop button in a notebook."""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from chexlib.machine import BATCH

log = logging.getLogger(__name__)
SHOWN = {
    "loss": "loss",
    "val_loss": "val loss",
    "val_auroc": "val AUROC",
    "images_per_second": "images/s",
}


def in_line(row: dict) -> str:
    """The numbers of an epoch in a line."""
    return "  ".join(
        f"{name} {row[key]:.3g}" for key, name in SHOWN.items() if row.get(key) is not None
    )


class LiveLine:
    """Logs one line per epoch. Pass it as `report` to `fit`."""

    def __init__(self):
        self.lines = None

    def __call__(self, numbers: dict) -> None:
        history = numbers["history"]
        if self.lines is None:  # epochs before a checkpoint were told before
            self.lines = min(len(history), numbers["epoch"] - 1)
        for row in history[self.lines :]:
            log.info("epoch %d/%d  %s", row["epoch"] + 1, numbers["epochs"], in_line(row))
        self.lines = len(history)


class LiveView:
    """A bar, a plot that moves, and a Stop button, in a notebook's output.

    Pass it as `report` to `fit`.

    Parameters
    ----------
    stop : callable
        What the button does.
    """

    PERIOD = 2.0  # seconds between two drawings of the plot

    def __init__(self, stop: Callable[[], None]):
        import ipywidgets as widgets
        from IPython.display import display

        self.stop, self.line = stop, LiveLine()
        self.points, self.drawn = [], 0.0
        self.bar = widgets.FloatProgress(max=1.0, layout={"width": "30%"})
        self.text = widgets.Label(
            "getting ready: reading images, building the network, tracing the first step ..."
        )
        self.button = widgets.Button(
            description="Stop", icon="stop", tooltip="End after this step; keep a checkpoint"
        )
        self.button.on_click(self._asked)
        self.plot = widgets.Image(
            format="png", layout={"max_width": "100%", "visibility": "hidden"}
        )
        self.box = widgets.VBox([widgets.HBox([self.bar, self.button, self.text]), self.plot])
        display(self.box)

    def __call__(self, numbers: dict) -> None:
        self.line(numbers)
        done = numbers["epoch"] - 1 + numbers["step"] / numbers["steps"]
        self.points.append({**numbers, "epoch": done})
        self.bar.value = done / numbers["epochs"]
        if not self.button.disabled:
            where = f"epoch {numbers['epoch']}/{numbers['epochs']}, step {numbers['step']}/{numbers['steps']}"
            self.text.value = f"{where}  {in_line({**(numbers['history'] or [{}])[-1], **numbers})}"
        if time.monotonic() - self.drawn > self.PERIOD:
            self.draw()

    def _asked(self, _button) -> None:
        self.button.disabled = True
        self.text.value = "stopping after this step; then the model so far is judged ..."
        self.stop()

    def draw(self) -> None:
        """Draw the plot anew."""
        # Loads matplotlib, which a training outside of a notebook does not need.
        from chexlib.figures.training import progress

        self.drawn = time.monotonic()
        picture = io.BytesIO()
        progress(self.points).savefig(picture, format="png", dpi=90)
        self.plot.value, self.plot.layout.visibility = picture.getvalue(), "visible"

    def close(self) -> None:
        """Say that nothing moves any more."""
        if self.points:
            self.draw()
            self.text.value = (
                f"ended.  {in_line((self.points[-1]['history'] or [self.points[-1]])[-1])}"
            )
        self.button.disabled = True


async def watched(function: Callable, *args: Any, engines=None, **kwargs: Any) -> Any:
    """`function(*args, report=..., **kwargs)`, such as `fit`, seen live from a notebook: `await
    watched(fit, config)`.

    It runs in a thread, so that the kernel goes on serving the Stop button. Headless it logs a line
    an epoch instead. Interrupting the cell asks for a stop too.
    """
    from chexlib import stopping

    stop = stopping.request if engines is None else engines.stop
    if engines is not None:
        kwargs["engines"] = engines
    view = LiveLine() if os.environ.get(BATCH) else LiveView(stop)
    work = asyncio.ensure_future(
        asyncio.to_thread(functools.partial(function, *args, report=view, **kwargs))
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop()
        raise
    finally:
        if isinstance(view, LiveView):
            view.close()
