"""Ensembles: which members, and one file that predicts.

Members may be any trainings: seeds, the ends of a schedule's cycles, checkpoints, or collapses from
these, as in the study's collapsed ensembles (77.5 % after 76.8 % of the best member).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import DataError
from chexlib.evaluation.auroc import mean_auroc, part_of
from chexlib.findings import FINDINGS

LEAST_GAIN = 1e-9  # a member that adds less to the validation AUROC is left out


def stack(
    predictions: Mapping[str, pd.DataFrame], *, part: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (members, n, 14), labels (n, 14) and patients (n,) of one part, from
    `predictions.parquet` tables.

    Raises
    ------
    DataError
        The members have not scored the same images in the same order, or none of this part.
    """
    members = {name: part_of(table, part)[0] for name, table in predictions.items()}
    first = next(iter(members))
    for name, rows in members.items():
        if list(rows["image"]) != list(members[first]["image"]):
            raise DataError(f"{name} has scored other images of part {part!r} than {first}.")
    labels = members[first][[f"label_{finding}" for finding in FINDINGS]].to_numpy()
    columns = [f"score_{finding}" for finding in FINDINGS]
    scores = np.stack([rows[columns].to_numpy() for rows in members.values()])
    return scores, labels, members[first]["patient"].to_numpy()


def choose(scores: np.ndarray, labels: np.ndarray) -> list[int]:
    """Members that gain together, chosen greedily: the best one, then whichever adds most, while
    one does.

    Forward selection (Caruana et al. 2004), without taking a member twice. Choose on validation,
    judge on test.

    Parameters
    ----------
    scores : (members, n, 14) of validation
    labels : (n, 14)
    """
    chosen, best = [], -np.inf
    while len(chosen) < len(scores):
        left = [i for i in range(len(scores)) if i not in chosen]
        tried = [mean_auroc(labels, scores[[*chosen, i]].mean(axis=0)) for i in left]
        if max(tried) < best + LEAST_GAIN:
            break
        best = max(tried)
        chosen.append(left[int(np.argmax(tried))])
    return chosen


def save_ensemble(members: Sequence[str | Path], path: str | Path) -> Path:
    """Write the models of `members` as one `.keras` file, which `chexlib predict` takes as any
    other.

    Parameters
    ----------
    members : paths of `model.keras` files
    path : where the ensemble goes
    """
    from chexlib.models.weights import ENSEMBLE, combine_models, load_model, save_model

    models, cards = zip(*(load_model(member) for member in members), strict=True)
    card = {"topology": ENSEMBLE, "size": cards[0]["size"], "split": cards[0].get("split")}
    return save_model(combine_models(list(models)), path, card={**card, "members": cards})
