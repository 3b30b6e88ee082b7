"""The collapses of notebook 06: from the end of each epoch of a training, an ensemble of them, and
what both gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import ConfigError
from chexlib.evaluation.auroc import mean_auroc, paired_difference
from chexlib.evaluation.ensembles import choose, diversity, save_ensemble, stack
from chexlib.evaluation.intervals import mean_of_seeds
from chexlib.studies.collapse import collapse, epoch_ends, score_checkpoints
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit


def measure_collapses(config: TrainConfig, *, ensemble: Path) -> dict | None:
    """Train, collapse from the end of every epoch, and make an ensemble of what comes out.

    Parameters
    ----------
    config : TrainConfig
        With a schedule that does not end in a rate of 0.
    ensemble : path
        Where the ensemble's one file goes.

    Returns
    -------
    dict or None
        before_<epoch> and after_<epoch>, mean test AUROC without and with a collapse;
        validation_<epoch> of the collapsed; chosen, the epochs of the ensemble; best_member, of
        those the best on validation; ensemble and member, their mean test AUROC; gain, gain_low,
        gain_high, and the same for each finding; diversity_<i>_<j> of each two epochs' members on
        validation, and diversity, their mean. None if the training was stopped.

    Raises
    ------
    WeightsError
        The checkpoint of an epoch's end is gone.
    """
    work = Path(config.run_dir)
    keep = 2 * config.epochs  # one an epoch, and a stop leaves one within an epoch too
    config = config.replace(checkpoint_steps=0, keep_checkpoints=keep, resume=True)
    result = fit(config)
    if result.stopped:
        return None
    points = epoch_ends(work / "checkpoints", epochs=len(result.history))
    before = score_checkpoints(list(points.values()))
    collapsed = {}
    for epoch, point in points.items():
        folder = work / f"collapse-{epoch}"
        done = (folder / "predictions.parquet").exists()  # by an earlier start of this row
        if not done and collapse(point, run_dir=folder, epochs=1, keep_checkpoints=0).stopped:
            return None
        collapsed[epoch] = pd.read_parquet(folder / "predictions.parquet")
    validation, labels, _ = stack(collapsed, part="validation")
    test, test_labels, patients = stack(collapsed, part="test")
    chosen = choose(validation, labels)
    together, best = test[chosen].mean(axis=0), chosen[0]
    apart = paired_difference(test_labels, together, test[best], patients)
    members = [work / f"collapse-{i + 1}" / "model.keras" for i in chosen]
    ensemble.parent.mkdir(parents=True, exist_ok=True)
    save_ensemble(members, ensemble)
    unlike = diversity(validation, list(collapsed))
    pairs = {f"diversity_{i}_{j}": float(unlike.loc[i, j]) for i, j in combinations(collapsed, 2)}
    found = {"chosen": ",".join(str(i + 1) for i in chosen), "best_member": best + 1}
    found |= {f"before_{i}": mean_auroc(test_labels, s) for i, s in enumerate(stack_of(before), 1)}
    found |= {f"after_{i}": mean_auroc(test_labels, s) for i, s in enumerate(test, 1)}
    found |= {f"validation_{i}": mean_auroc(labels, s) for i, s in enumerate(validation, 1)}
    for name, row in apart.iterrows():
        own = "" if name == "mean" else f"_{name}"
        found |= {
            f"gain{own}": row["difference"],
            f"gain_low{own}": row["low"],
            f"gain_high{own}": row["high"],
        }
    means = {
        "ensemble": mean_auroc(test_labels, together),
        "member": mean_auroc(test_labels, test[best]),
    }
    return {
        **found,
        **means,
        **pairs,
        "diversity": float(np.mean(list(pairs.values()))) if pairs else 0.0,
    }


def stack_of(tables: list[pd.DataFrame]) -> np.ndarray:
    """Test scores of several tables, (tables, n, 14)."""
    return stack(dict(enumerate(tables)), part="test")[0]


def collapse_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC before and after a collapse from each epoch, and means over seeds of its gain with
    Student's t intervals.

    Returns
    -------
    DataFrame
        Index the epoch; columns before, after, gain, low, high, seeds. A collapse is one epoch
        more, so the same over what the training itself had reached one epoch later: gain_later,
        low_later, high_later, NaN for the last.
    """
    epochs = sorted(int(name.split("_")[1]) for name in rows if name.startswith("before_"))
    found = {}
    for epoch in epochs:
        before, after = rows[f"before_{epoch}"], rows[f"after_{epoch}"]
        own = mean_of_seeds(after - before)
        later = mean_of_seeds(after - rows.get(f"before_{epoch + 1}", np.nan))
        found[epoch] = {
            "before": before.mean(),
            "after": after.mean(),
            "gain": own.pop("effect"),
            **own,
        }
        found[epoch] |= {
            "gain_later": later["effect"],
            "low_later": later["low"],
            "high_later": later["high"],
        }
    return pd.DataFrame(found.values(), index=pd.Index(found, name="epoch"))


def diversity_matrix(row: Mapping) -> pd.DataFrame:
    """How unlike the members of each two epochs are, from a row of `measure_collapses`: symmetric,
    0 on the diagonal.

    Raises
    ------
    ConfigError
        The row has no diversity of pairs.
    """
    told = {name: apart for name, apart in dict(row).items() if name.startswith("diversity_")}
    # Rows of fewer epochs have NaN where others of one table have pairs.
    pairs = {
        tuple(map(int, name.split("_")[1:])): apart
        for name, apart in told.items()
        if not pd.isna(apart)
    }
    if not pairs:
        raise ConfigError(
            "the row has no diversity_1_2 and so on: it is of one epoch, or older. Measure it anew."
        )
    epochs = sorted({epoch for pair in pairs for epoch in pair})
    table = pd.DataFrame(0.0, index=pd.Index(epochs, name="epoch"), columns=epochs)
    for (i, j), apart in pairs.items():
        table.loc[i, j] = table.loc[j, i] = apart
    return table
