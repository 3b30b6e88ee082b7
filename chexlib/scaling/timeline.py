"""Horovod's timeline (HOROVOD_TIMELINE=FILE), as rank 0 writes it, read into tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import pandas as pd

_PHASES = {
    "MEMCPY_IN_FUSION_BUFFER": "copy_in",
    "MPI_ALLREDUCE": "allreduce",
    "MEMCPY_OUT_FUSION_BUFFER": "copy_out",
}
_BYTES = {"float32": 4, "float16": 2, "float64": 8, "int32": 4, "int64": 8, "uint8": 1}


def read_timeline(path: str | Path) -> tuple[pd.DataFrame, float]:
    """Allreduces of a training, one row each, and what negotiating cost rank 0.

    Returns
    -------
    allreduces : DataFrame
        start (seconds), tensors (how many were fused), bytes, and seconds of copy_in, allreduce,
        copy_out.
    request : float
        Seconds that rank 0 took for one gradient of one rank, the median over requests that came
        together; NaN if none did.
    """
    text = Path(path).read_text().rstrip().rstrip(",")
    events = [event for event in json.loads(text if text.endswith("]") else text + "]") if event]
    open_, times, sizes, order = {}, defaultdict(dict), {}, []
    for event in events:
        pid, phase = event.get("pid"), event.get("ph")
        if phase == "B":
            open_.setdefault(pid, []).append((event["name"], event["ts"]))
        elif phase == "E" and open_.get(pid):
            name, began = open_[pid].pop()
            if shape := event.get("args", {}).get("shape"):
                sides = [int(side) for side in shape.strip("[]").replace(",", " ").split()]
                sizes[pid] = math.prod(sides) * _BYTES[event["args"]["dtype"]]
            if name in _PHASES:
                times[pid].setdefault(name, []).append((began, event["ts"]))
                order.append((pid, len(times[pid][name]) - 1) if name == "MPI_ALLREDUCE" else None)
    buffers = defaultdict(list)
    # Tensors of one buffer begin and end together, to the writer's few microseconds.
    for pid, i in filter(None, order):
        began, _ = times[pid]["MPI_ALLREDUCE"][i]
        last = max(buffers, default=None)
        same = last is not None and began <= max(
            times[p]["MPI_ALLREDUCE"][j][1] for p, j in buffers[last][:1]
        )
        buffers[last if same else began].append((pid, i))
    rows = []
    for began, members in buffers.items():
        row = {
            "start": began / 1e6,
            "tensors": len(members),
            "bytes": sum(sizes.get(pid, 0) for pid, _ in members),
        }
        for name, column in _PHASES.items():
            both = [times[pid][name][i] for pid, i in members if len(times[pid].get(name, ())) > i]
            row[column] = (min(e for _, e in both) - max(b for b, _ in both)) / 1e6 if both else 0.0
        rows.append(row)
    columns = ["start", "tensors", "bytes", *_PHASES.values()]
    return pd.DataFrame(rows, columns=columns).sort_values("start", ignore_index=True), _request(
        events
    )


def _request(events: list[dict]) -> float:
    """Requests of one rank come in one message, and are gone through one after the other."""
    noted = pd.DataFrame(
        [(e["name"], e["ts"]) for e in events if e.get("ph") == "X"], columns=["rank", "time"]
    )
    gap = noted["time"].diff()
    message = ((noted["rank"] != noted["rank"].shift()) | (gap > 1000)).cumsum()
    each = noted.groupby(message)["time"].agg(["count", "min", "max"]).query("count >= 20")
    return (
        float(((each["max"] - each["min"]) / (each["count"] - 1)).median()) / 1e6
        if len(each)
        else math.nan
    )
