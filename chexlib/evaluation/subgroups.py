"""Whom does a model serve less well? AUROC within sex, age band, view position and follow-up."""

from __future__ import annotations

import numpy as np
import pandas as pd

from chexlib.evaluation.auroc import auroc_table, part_of
from chexlib.evaluation.resampling import FEWEST_PATIENTS, patients_behind
from chexlib.findings import FINDINGS

AGES = {"under 40": 40, "40 to 59": 60, "60 and over": np.inf}  # years: band, and where it ends
TRAITS = ("sex", "age", "view", "visit")


def traits_of(table: pd.DataFrame) -> pd.DataFrame:
    """Sex, age band, view position and visit ("first" or "follow-up") of radiographs; "unknown"
    where not told.

    `table` is that of `Radiographs`, its columns sex, age, view and follow_up.
    """
    bands = np.array([*AGES, "unknown"])
    ages = np.searchsorted(list(AGES.values()), table["age"].fillna(np.inf), side="right")
    return pd.DataFrame(
        {
            "sex": table["sex"].replace("", "unknown"),
            "age": bands[np.where(table["age"].isna(), len(AGES), ages)],
            "view": table["view"].replace("", "unknown"),
            "visit": np.where(table["follow_up"] == 0, "first", "follow-up"),
        },
        index=table.index,
    )


def subgroup_auroc(
    predictions: pd.DataFrame,
    radiographs,
    *,
    part: str = "test",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of each finding and their mean in each subgroup, with intervals over patients.

    Parameters
    ----------
    predictions : DataFrame, as `predictions.parquet`
    radiographs : Radiographs
        Of which the images are; all that are listed are known.

    Returns
    -------
    DataFrame
        Index trait, group, finding; columns images, patients, findings, auroc, low, high,
        positives, negatives. The mean of a group is over the `findings` that have `FEWEST_PATIENTS`
        patients of each class in every group of the trait that has any such finding: so groups of a
        trait can be compared. One without is too small to speak: NaN.
    """
    rows, labels, scores = part_of(predictions, part)
    patients = rows["patient"].to_numpy()
    listed = radiographs.listed.set_index("image").loc[rows["image"]].reset_index()
    found = {}
    for trait, values in traits_of(listed).items():
        groups = {group: (values == group).to_numpy() for group in sorted(values.unique())}
        behind = {
            g: patients_behind(labels[of], pd.factorize(patients[of])[0])[:-1]
            for g, of in groups.items()
        }
        enough = {g: counts >= FEWEST_PATIENTS for g, counts in behind.items()}
        speaking = [e for e in enough.values() if e.any()]
        common = np.all(speaking, axis=0) if speaking else np.zeros(len(FINDINGS), bool)
        for group, of in groups.items():
            table = auroc_table(
                labels[of], scores[of], patients[of], resamples=resamples, seed=seed
            )
            shared = np.where(common & enough[group], labels[of], np.nan)
            mean = auroc_table(
                shared, scores[of], patients[of], resamples=resamples, seed=seed
            ).loc["mean"]
            table.loc["mean", ["auroc", "low", "high"]] = mean[["auroc", "low", "high"]]
            counts = {"images": of.sum(), "patients": len(np.unique(patients[of]))}
            findings = int((common & enough[group]).sum())
            found[trait, group] = table.assign(**counts, findings=findings)
    columns = ["images", "patients", "findings", "auroc", "low", "high", "positives", "negatives"]
    return pd.concat(found, names=["trait", "group"])[columns]
