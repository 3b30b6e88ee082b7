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

from chexlib.errors import DataError
from chexlib.evaluation.auroc import auroc_samples, mean_auroc
from chexlib.evaluation.ensembles import stack
from chexlib.evaluation.intervals import paired_bootstrap
from chexlib.files import atomic_write
from chexlib.studies.grid import point_key, run_grid
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training
from chexlib.training.input import predictions_of

FEWEST = 20  # positives of a finding, below which it has no part in the mean


def cross_validate(
    arms: Mapping[str, Callable[[TrainConfig], Training]],
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
    arms : name -> `train(config)`, such as `learn`
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
        A row per training: key, arm, fold, seed, auroc (mean on its fold), seconds; fewer rows if it
        was stopped.
    """
    folder = Path(folder)
    (folder / "scores").mkdir(parents=True, exist_ok=True)

    def measure(point, work):
        changes = {
            "seed": point["seed"],
            "split": f"fold-{point['fold']}-of-{folds}",
            "run_dir": str(work),
        }
        training = arms[point["arm"]](config.replace(**changes))
        if training.stopped:
            return None
        test, scores = training.parts["test"], training.score("test")
        with atomic_write(folder / "scores" / f"{point_key(point)}.parquet") as file:
            predictions_of(test, scores, "test").to_parquet(file, index=False)
        keep(point, training.model)
        return {"auroc": mean_auroc(test.labels, scores), "seconds": training.seconds}

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
    scores, labels, patients = stack(dict(enumerate(ours)), part="test")
    others, _, _ = stack(dict(enumerate(theirs)), part="test")
    counts = labels.sum(axis=0)
    labels = np.where(counts >= fewest, labels.astype(float), np.nan)

    def mean_over_seeds(labels, several, drawn, codes):
        measured = [auroc_samples(labels, of_seed, drawn, codes) for of_seed in several]
        points, samples = zip(*measured, strict=True)
        return np.mean(points, axis=0), np.mean(samples, axis=0)

    table = paired_bootstrap(
        mean_over_seeds, labels, scores, others, patients, resamples=resamples, seed=seed
    )
    table = table.rename(columns={"value": "auroc"}).drop(columns=["p", "p_holm"])
    positives = np.append(counts, counts[counts >= fewest].sum()).astype(int)
    return table.assign(positives=positives)
