"""Two ways to start a training, compared by cross-validation over patients: what is gained, and how
sure that is.

Each image is scored once a seed, by a network that has seen none of its patient. Scores of all
folds are pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.collectives import World
from chexlib.errors import DataError
from chexlib.evaluation.auroc import resample
from chexlib.evaluation.ensembles import mean_auroc, stack
from chexlib.evaluation.resampling import draw_patients, interval_of, mean_of, patients_behind
from chexlib.files import atomic_write
from chexlib.findings import FINDINGS
from chexlib.studies.grid import point_key, run_grid
from chexlib.training.callbacks import pooled_scorer
from chexlib.training.config import TrainConfig
from chexlib.training.fit import TrainResult
from chexlib.training.input import predictions_of

FEWEST = 20  # positives of a finding, below which it has no part in the mean


def cross_validate(
    arms: Mapping[str, Callable[..., TrainResult]],
    config: TrainConfig,
    folder: str | Path,
    *,
    told: Mapping,
    folds: int = 5,
    seeds: Sequence[int],
    keep: Callable[[Mapping, object], None] = lambda point, model: None,
) -> pd.DataFrame:
    """Train every arm on every fold with every seed; killed, it goes on with the training that was
    under way.

    The last weights of each training are judged: nothing is chosen by what is tested.

    Parameters
    ----------
    arms : name -> `train(config, measure=...)`, such as `fit`
    config : TrainConfig
        What the arms have in common; seed, split and run_dir are set here. A seed has its own folds
        too.
    folder : path
        For the table `trainings.parquet`, and `scores/<key>.parquet` of each training.
    told : dict of plain values
        All else that decides what comes out, such as the data's digest and the arms' settings.
    keep : callable
        Called as `keep(point, model)` after each training: arm, fold and seed are in the point.

    Returns
    -------
    DataFrame
        A row a training: key, arm, fold, seed, auroc (mean on its fold), seconds; fewer rows if it
        was stopped.
    """
    folder = Path(folder)
    (folder / "scores").mkdir(parents=True, exist_ok=True)

    def measure(point, work):
        def look(trainer, parts, world: World):
            scores = pooled_scorer(trainer.infer, parts, world, size=config.size)("test")
            with atomic_write(folder / "scores" / f"{point_key(point)}.parquet") as file:
                predictions_of(parts["test"], scores, "test").to_parquet(file, index=False)
            keep(point, trainer.model)
            return {"auroc": mean_auroc(parts["test"].labels, scores)}

        settings = {
            "seed": point["seed"],
            "split": f"fold-{point['fold']}-of-{folds}",
            "run_dir": str(work),
        }
        result = arms[point["arm"]](config.replace(**settings), measure=look)
        return None if result.stopped else {**result.measured, "seconds": result.seconds}

    points = [
        {**told, "arm": arm, "fold": fold, "folds": folds, "seed": seed}
        for seed in seeds
        for arm in arms
        for fold in range(1, folds + 1)
    ]
    return run_grid(points, folder / "trainings.parquet", measure)


def pooled(rows: pd.DataFrame, folder: str | Path, arm: str) -> list[pd.DataFrame]:
    """Scores of all images by one arm, a table a seed, in the form of `predictions.parquet`, part
    "test".

    Raises
    ------
    DataError
        A fold is missing, or an image was scored twice.
    """
    tables = []
    for seed, own in rows[rows["arm"] == arm].groupby("seed"):
        if set(own["fold"]) != set(range(1, own["folds"].iloc[0] + 1)):
            raise DataError(
                f"{arm}, seed {seed}: only folds {sorted(own['fold'])} are there. Run it again to "
                "go on."
            )
        table = pd.concat(
            [pd.read_parquet(Path(folder) / "scores" / f"{key}.parquet") for key in own["key"]]
        )
        if table["image"].duplicated().any():
            raise DataError(
                f"{arm}, seed {seed}: images were scored by several folds. Remove {folder}."
            )
        tables.append(table.sort_values("image", ignore_index=True))
    return tables


def arm_gains(
    ours: Sequence[pd.DataFrame],
    theirs: Sequence[pd.DataFrame],
    *,
    fewest: int = FEWEST,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of two arms, each the mean over its seeds, and their difference in the same resamples
    of patients.

    The interval is that of `paired_difference`: it says how other patients would have been scored.
    That of seeds is not in it, but for what averaging them leaves.

    Parameters
    ----------
    ours, theirs : tables of `pooled`, one a seed
    fewest : int
        Findings with fewer positives have no part in the mean, and NaN.

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns auroc, other, difference, low, high, positives.
    """
    (scores, labels, patients), (others, _, _) = (
        stack(dict(enumerate(tables)), part="test") for tables in (ours, theirs)
    )
    counts = labels.sum(axis=0)
    labels = np.where(counts >= fewest, labels.astype(float), np.nan)
    drawn, codes = draw_patients(patients, resamples=resamples, seed=seed)

    def judged(several):
        found = [resample(labels, one, drawn, codes) for one in several]
        points, samples = (
            np.mean([p[0] for p, _ in found], axis=0),
            np.mean([s[0] for _, s in found], axis=0),
        )
        return np.append(points, mean_of(points[None])), np.vstack(
            [samples, mean_of(samples[None])]
        )

    (points, samples), (other_points, other_samples) = judged(scores), judged(others)
    difference = points - other_points
    low, high = interval_of(difference, samples - other_samples, patients_behind(labels, codes))
    columns = {
        "auroc": points,
        "other": other_points,
        "difference": difference,
        "low": low,
        "high": high,
    }
    positives = np.append(counts, counts[counts >= fewest].sum()).astype(int)
    return pd.DataFrame(
        columns | {"positives": positives}, index=pd.Index([*FINDINGS, "mean"], name="finding")
    )
