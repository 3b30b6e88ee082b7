"""Measured on this machine: which ranks x threads, batch and precision train fastest, kept and made
a profile.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from chexlib.errors import ClusterError, ConfigError, DataError
from chexlib.files import ROOT, atomic_write, file_lock, read_json, require_writable
from chexlib.machine import cores, hardware
from chexlib.scaling.throughput import measure
from chexlib.training.config import TrainConfig

# What `chexlib run --profile quick,tuned` reads.
PROFILE = ROOT / "notebooks" / "profiles" / "tuned.yaml"
SWEEP = ROOT / "data" / "tuned.json"
KEYS = ["topology", "size", "precision", "batch_per_rank", "ranks", "threads"]
log = logging.getLogger(__name__)


def layouts() -> list[tuple[int, int]]:
    """(ranks, threads) worth measuring: powers of two and all processors, no more of both than
    there are.
    """
    processors = cores()
    sizes = sorted({2**i for i in range(processors.bit_length())} | {processors})
    return [(r, t) for r in sizes for t in sizes if r * t <= processors]


def tune(
    *,
    topology: str = "densenet121",
    size: int = 224,
    batches: Sequence[int] = (16,),
    precisions: Sequence[str] = ("float32",),
    steps: int = 6,
    sweep: str | Path = "",
) -> pd.DataFrame:
    """Measure the training step in every layout, batch and precision that `sweep` does not hold
    yet.

    Each point is written when it is measured, so a sweep that was interrupted goes on where it was,
    and several at a time lose none of each other's points (their speeds are those of a machine that
    they share). Points of another processor or number of cores are not taken for this machine's,
    and those that failed or had fewer steps are measured again.

    Returns
    -------
    DataFrame
        A row per point, the fastest first: topology, size, precision, batch_per_rank, ranks, threads,
        images_per_second (NaN where the ranks failed), and gflops, its floating-point operations
        per second in 10^9.

    Raises
    ------
    ConfigError
        A setting that no training accepts, before anything is measured.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps} is not accepted. Use 1 or more steps per measurement.")
    for precision, batch in itertools.product(precisions, batches):
        TrainConfig(
            data_dir=".",
            run_dir=".",
            topology=topology,
            size=size,
            batch_size=batch,
            precision=precision,
        )
    path, here = Path(sweep or SWEEP), hardware()
    rows = _points(path)
    points = []
    for precision, batch, layout in itertools.product(precisions, batches, layouts()):
        points.append(dict(zip(KEYS, (topology, size, precision, batch, *layout), strict=True)))
    measured = [row for row in rows if row["images_per_second"] and row["steps"] >= steps]
    missing = [point for point in points if _newest(measured, {**point, **here}) is None]
    if missing:
        require_writable(path.parent, "What is measured is kept there.")
    for point in tqdm(missing, desc="layouts", unit="layout", leave=False):
        settings = {name: point[name] for name in KEYS[:4]}
        try:
            speed = measure(settings, ranks=point["ranks"], threads=point["threads"], steps=steps)
        except ClusterError as error:
            log.warning("%s", error)
            speed = {"images_per_second": None, "gflop_per_image": None, "seconds": []}
        rows = _add(path, {**point, **here, "steps": steps, **speed})
    table = pd.DataFrame([_newest(rows, {**point, **here}) for point in points])
    speeds = table["images_per_second"].astype(float)
    gflops = speeds * table["gflop_per_image"].astype(float)
    table = table[KEYS].assign(images_per_second=speeds, gflops=gflops)
    return table.sort_values("images_per_second", ascending=False, kind="stable", ignore_index=True)


def save_winner(table: pd.DataFrame, path: str | Path = "") -> dict:
    """Write the fastest row as a profile: engines, threads, and what else differs in the table.

    Gives what was written.

    Raises
    ------
    ConfigError
        No layout could be measured.
    """
    if table["images_per_second"].isna().all():
        raise ConfigError(
            "no number of ranks and threads could be measured: the warnings above say why. Try a "
            "smaller --size or --batch."
        )
    best = table.iloc[0]
    winner = {"engines": int(best["ranks"]), "threads": int(best["threads"])}
    if len(set(table["batch_per_rank"])) > 1:  # else it was not asked which one is best
        winner["batch_size"] = int(best["batch_per_rank"])
    if len(set(table["precision"])) > 1:
        winner["precision"] = str(best["precision"])
    said = f"{best['images_per_second']:.2f} images/s, the fastest of {len(table)}"
    lines = [f"# Written by `chexlib tune`. {best['topology']}, {best['size']} px: {said}."]
    lines += [f"{name}: {value}" for name, value in winner.items()]
    with atomic_write(path or PROFILE) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return winner


def _points(path: Path) -> list[dict]:
    points, needed = read_json(path, list), {*KEYS, "images_per_second", "steps"}
    if not all(isinstance(point, dict) and needed <= point.keys() for point in points):
        raise DataError(f"{path} is not a list of measurements of `tune`. Move it away.")
    return points


def _add(path: Path, point: dict) -> list[dict]:
    """Write one more point after those that are in the file by now. Gives all of them."""
    with file_lock(path.with_name(f".{path.name}.lock")):
        points = [*_points(path), point]
        with atomic_write(path) as file:
            file.write(json.dumps(points, indent=1).encode())
    return points


def _newest(rows: list[dict], settings: dict) -> dict | None:
    """The last row of these settings, if there is one."""
    for row in reversed(rows):
        if settings.items() <= row.items():
            return row
    return None
