"""A grid of trainings as rows of one JSON-lines file: each is measured once, and a killed grid goes
on where it was.

Any number of processes may work on one grid, on all hosts that see its folder: where a training is
too small to keep all cores busy, two processes with half of the cores each are done sooner than
one. Engines do the same, and one process hands them the points.

A row names what made it. The version of the training and the precision are part of its key: a row
of another version is stale, and its point is trained anew. Commit and machine are told in the row
only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import pickle
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from tqdm.auto import tqdm

from chexlib import stopping
from chexlib.errors import ConfigError, DivergedError, first_line
from chexlib.files import atomic_write, file_lock
from chexlib.machine import environment, native_precision
from chexlib.training import TRAINING_VERSION
from chexlib.training.config import FREE, TrainConfig
from chexlib.training.fit import Training, learn
from chexlib.training.trainer import Reuse

if TYPE_CHECKING:  # ipyparallel takes long to import
    from chexlib.cluster.engines import Engines

MADE_BY = ("training_version", "precision", "commit", "machine")  # what a row tells of its training
DEFAULTS = {setting.name: setting.default for setting in dataclasses.fields(TrainConfig)}
log = logging.getLogger(__name__)


def run_grid(
    points: Sequence[Mapping],
    table: str | Path,
    measure: Callable[[dict, Path], Mapping | None],
    *,
    engines: Engines | None = None,
) -> pd.DataFrame:
    """Measure every point that `table` does not hold yet, and return the rows of all points in
    their order.

    Each row is written when it is measured. The file may hold rows of other grids too: a point is
    identified by `point_key`, so its settings must name all that decides its outcome: data, seed,
    and what `deciding_settings` has of a config. Rows of another version of the training stay in
    the file, unused, and are counted in the log. A point that another process is measuring is left
    to it, waited for, and taken over if that process ends without it.

    Parameters
    ----------
    points : sequence of dict
        Flat settings, of plain values for JSON. A point that is there twice is measured once.
    table : path of the JSON-lines file; it and its folder are made if missing
    measure : callable
        `measure(point, folder)` returns a flat dict of results, or None if it was stopped: then the
        grid ends there. What it keeps in `folder`, such as a training's checkpoints, is there again
        when a killed grid goes on with this point, and removed when its row is written. With `fit`:
        `config.replace(run_dir=folder, resume=True)`.
    engines : Engines, optional
        From `mpi_engines(..., joined=False)`: each measures one point after the other, by itself.
        `measure` must be one that can be pickled. What an engine has not measured when it ends,
        another one measures.

    Returns
    -------
    DataFrame
        Columns key, the settings, the results, `MADE_BY`; fewer rows than points if the grid was
        stopped.

    Raises
    ------
    ConfigError
        No points; results are named as settings or `MADE_BY` are; the table is no such table, or
        `measure` cannot be sent to engines.
    ClusterError
        Engines that fail, or of which none is left: what is measured stays.
    """
    if not points:
        raise ConfigError(
            "the grid has no training. Name one seed or more, and a value of each setting."
        )
    table, wanted = Path(table), {point_key(point): dict(point) for point in points}
    table.parent.mkdir(parents=True, exist_ok=True)
    work = table.with_name(f".{table.stem}-work")
    rows = _read_rows(table)
    missing = [key for key in wanted if key not in rows]
    stale = sum(row.get("training_version") != TRAINING_VERSION for row in rows.values())
    if missing and stale:
        log.info(
            "%s: %d of %d rows are not of training version %d and are not used; %d to be trained",
            *(table.stem, stale, len(rows), TRAINING_VERSION, len(missing)),
        )
    for key in set(wanted) - set(missing):  # killed between writing the row and removing the folder
        shutil.rmtree(work / key, ignore_errors=True)
    settings = pd.DataFrame(list(wanted.values())).astype(str)
    varied = [name for name in settings if len(settings[name].unique()) > 1]
    began = time.monotonic()
    bar = tqdm(total=len(missing), desc=table.stem, unit="row", disable=not missing, leave=False)
    todo = {key: wanted[key] for key in missing}
    if engines is None or not todo:
        measured = _measured_here(todo, table, measure, bar, varied)
    else:
        measured = _measured_on(engines, todo, table, measure, bar)
    with bar, contextlib.closing(measured):
        for row_written in measured:
            rows = _read_rows(table)
            done = sum(key in rows for key in missing)
            left = len(missing) - done
            if not row_written:
                log.info("%s was stopped with %d rows to go: run it again to go on", table, left)
                break
            minutes = round((time.monotonic() - began) / done * left / 60)
            unit = "minute" if minutes == 1 else "minutes"
            log.info(
                "%s: row %d of %d, about %d %s to go", table.stem, done, len(missing), minutes, unit
            )
    return read_grid(points, table)


def read_grid(points: Sequence[Mapping], table: str | Path) -> pd.DataFrame:
    """The rows of those `points` that the file `table` holds, in their order, as of `run_grid`."""
    rows = _read_rows(Path(table))
    keys = dict.fromkeys(point_key(point) for point in points)
    shown = [rows[key] for key in keys if key in rows]
    columns = dict.fromkeys(["key", *(name for row in shown for name in row)])
    return pd.DataFrame(shown, columns=list(columns))


def _measured_here(
    points: Mapping[str, Mapping], table: Path, measure: Callable, bar, varied: Sequence[str]
) -> Iterator[bool]:
    """Measure each point without a row that no other process holds, until all have rows: whether
    the row was written, or its training was stopped.
    """
    left = list(points)
    while left:
        for key in left:
            point = points[key]
            bar.set_postfix_str(", ".join(f"{k}={point[k]}" for k in varied if k in point)[:80])
            if (written := _measure(key, point, table, measure)) is not None:
                yield written
            bar.update(len(points.keys() & _read_rows(table).keys()) - bar.n)
        before, left = left, [key for key in left if key not in _read_rows(table)]
        if left == before:
            bar.set_postfix_str(f"{len(left)} rows are in the hands of other processes")
            time.sleep(1)


def _measured_on(
    engines: Engines, points: Mapping[str, Mapping], table: Path, measure: Callable, bar
) -> Iterator[bool]:
    """`_measured_here` by engines. After a stop those that were not asked yet end too."""
    try:
        packed = pickle.dumps(measure)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"what measures a point cannot be sent to engines ({first_line(error)}). Use a function "
            "of a module."
        ) from error
    tasks = deque((key, dict(points[key]), str(table.absolute()), packed) for key in points)
    with stopping.listening():
        for task, written in engines.share(_measure_on_engine, tasks):
            done = points.keys() & _read_rows(table).keys()
            bar.update(len(done) - bar.n)
            if written:
                yield True
            elif written is not None:
                stopping.request()  # those of the others too
            elif task[0] not in done:
                tasks.append(task)  # in the hands of another process, which may end without it
                time.sleep(1)
        if stopping.requested():
            yield False


def _measure_on_engine(key: str, point: dict, table: str, packed: bytes) -> bool | None:
    return _measure(key, point, Path(table), _unpacked(packed))


@functools.lru_cache(maxsize=1)
def _unpacked(packed: bytes) -> Callable:
    """Once for all points, so that the graph of a training serves the next."""
    return pickle.loads(packed)


def _measure(key: str, point: Mapping, table: Path, measure: Callable) -> bool | None:
    """Measure a point and write its row, unless it has one or another process is at it (None);
    False if it was stopped.
    """
    work = table.with_name(f".{table.stem}-work")
    folder = work / key
    work.mkdir(exist_ok=True)
    with file_lock(work / f"{key}.lock", wait=False) as locked:
        if not locked or key in _read_rows(table):
            return None
        folder.mkdir(exist_ok=True)
        with _only_warnings():
            results = measure(dict(point), folder)
        if results is None:
            return False
        if clash := sorted({"key", *point, *MADE_BY} & set(results)):
            raise ConfigError(
                f"results have the names of settings: {', '.join(clash)}. Give them other names."
            )
        with file_lock(work / "table.lock"):
            _append(table, {"key": key, **point, **results, **_made_by(point)})
        shutil.rmtree(folder, ignore_errors=True)
    return True


@contextlib.contextmanager
def _only_warnings() -> Iterator[None]:
    """Within the block chexlib logs nothing below a warning: a grid tells of rows, not of what each
    training reads.
    """
    logger = logging.getLogger("chexlib")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def measure_training(
    config: TrainConfig,
    columns: Callable[[Training], dict],
    *,
    reuse: Reuse | None = None,
    watch: Sequence = (),
) -> dict | None:
    """Train, and return a grid's row: "diverged", and if it is false, what `columns` measures.

    Parameters
    ----------
    config : TrainConfig
    columns : `columns(training)` gives what the row holds, from the last weights
    reuse, watch : as for `learn`

    Returns
    -------
    dict or None
        None if the training was stopped, as `run_grid` takes it.
    """
    try:
        training = learn(config, reuse=reuse, watch=watch)
    except DivergedError:
        return {"diverged": True}
    # A stop that is asked for from here on ends the grid's next training after its first step.
    return None if training.stopped else {"diverged": False, **columns(training)}


def deciding_settings(config: TrainConfig) -> dict:
    """The settings of a config that decide what comes of a training, as flat plain values for the
    points of a grid.

    Left out is what `TrainConfig.require_same` lets a resumed training change, but for epochs and
    batches: folders, checkpoints, how to resume.
    """
    free = set(FREE) - {"epochs", "batch_size", "accumulation"}
    settings = {name: value for name, value in config.to_dict().items() if name not in free}
    if isinstance(settings["schedule"], dict):
        settings["schedule"] = json.dumps(settings["schedule"], sort_keys=True)
    return settings


def point_key(point: Mapping) -> str:
    """16 hexadecimal digits of SHA-256 of what decides a row: settings by name, training version
    and precision.

    The precision is the point's own, or else the one that `TrainConfig` takes on this processor.

    Examples
    --------
    >>> point_key({"seed": 0, "norm": "batch"}) == point_key({"norm": "batch", "seed": 0})
    True
    """
    # A setting at its default is left out, so that rows outlive a setting that is added later.
    decide = {n: v for n, v in point.items() if n not in DEFAULTS or v != DEFAULTS[n]}
    decide |= {"training_version": TRAINING_VERSION, "precision": _precision(point)}
    return hashlib.sha256(json.dumps(decide, sort_keys=True).encode()).hexdigest()[:16]


def _precision(point: Mapping) -> str:
    asked = point.get("precision", "auto")
    return native_precision() if asked == "auto" else asked


def _made_by(point: Mapping) -> dict:
    """`MADE_BY` of a row that is measured now."""
    about = environment()
    return {
        "training_version": TRAINING_VERSION,
        "precision": _precision(point),
        "commit": about["commit"],
        "machine": f"{about['processor']}, {about['cores']} cores",
    }


def _read_rows(table: Path) -> dict[str, dict]:
    """The rows of a table by key, in the order in which they were written, each with its own
    columns.
    """
    if not table.exists():
        return {}
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        return {row["key"]: row for row in rows}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{table} is not a table of a grid ({first_line(error)}). Name another file, or move it "
            "away."
        ) from error


def _append(table: Path, row: dict) -> None:
    # Read anew: another notebook may have written since.
    rows = {**_read_rows(table), row["key"]: row}
    with atomic_write(table) as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows.values()).encode())
