"""Intervals: over patients by a bootstrap, over seeds by Student's t, and the verdicts that follow.

An interval over patients says how other patients would have been judged, one over seeds how another
start of the same training would have ended. Neither says anything of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit

from chexlib.findings import FINDINGS

# Of each class, below which resampling says nothing about how uncertain an AUROC is.
FEWEST_PATIENTS = 5
LEVEL = 0.95  # of every interval: how often it is to hold the truth
EDGE = 1e-4  # shares of resamples are kept this far from 0 and 1, where logits are infinite

REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"

CHANCE = 0.5  # AUROC of scores that know nothing of the labels
# Least mean AUROC of a baseline of which something is concluded. From 0.7 discrimination is called
# acceptable (Hosmer and Lemeshow, Applied Logistic Regression, 2nd edition, 2000, section 5.2.4).
# There 0.01 of AUROC are 5 % of the skill; nearer to chance the noise of seeds is most of a loss.
LEARNT = 0.7


def draw_patients(
    patients: np.ndarray, *, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap over patients: how often each is drawn in each resample, (patients, resamples), and
    the row of each image's patient.

    Patients, not images, are drawn with replacement (Field and Welsh 2007).
    """
    codes, names = pd.factorize(np.asarray(patients))
    n = len(names)
    drawn = np.random.default_rng(seed).integers(0, n, (n, resamples))
    cells = drawn * resamples + np.arange(resamples)
    times = np.bincount(cells.ravel(), minlength=n * resamples)
    return times.reshape(n, resamples).astype(np.float64), codes


def patients_behind(labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Effective number of patients of each finding, and for the mean the median of those with
    enough: (15,) float.

    Of the smaller class, and as `effective_number` counts them: one patient with most of the
    positive images is worth little more than one patient.
    """
    fewer = []
    for of_finding in np.asarray(labels).T:
        positive, negative = codes[of_finding == 1], codes[of_finding == 0]
        fewer.append(min(effective_number(positive), effective_number(negative)))
    enough = [patients for patients in fewer if patients >= FEWEST_PATIENTS]
    return np.append(fewer, np.median(enough) if enough else 0.0)


def enough_patients(labels: np.ndarray, patients, least: int = FEWEST_PATIENTS) -> np.ndarray:
    """Which findings have so many patients of each class, (14,) bool."""
    codes, _ = pd.factorize(np.asarray(patients))
    return patients_behind(labels, codes)[:-1] >= least


def effective_number(codes: np.ndarray) -> float:
    """Patients with equally many images that are worth as much as these (Kish 1965); 0 without
    images.

    `codes` (images,) says whose each image is.
    """
    _, counts = np.unique(codes, return_counts=True)
    images = counts.astype(float)
    return float(images.sum() ** 2 / (images**2).sum()) if len(images) else 0.0


def with_mean(values: np.ndarray) -> np.ndarray:
    """Values (findings, ...) and below them their mean over the findings that are defined; NaN if
    none is.
    """
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean = np.where(defined, values, 0.0).sum(axis=0) / defined.sum(axis=0)
    return np.concatenate([values, [mean]])


def table_of_findings(columns: dict) -> pd.DataFrame:
    """A table with a row per finding and one for their mean."""
    return pd.DataFrame(columns, index=pd.Index([*FINDINGS, "mean"], name="finding"))


def interval_of(
    points: np.ndarray, samples: np.ndarray, patients: np.ndarray, *, share: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval with the standard error of resamples, NaN below `FEWEST_PATIENTS`
    patients.

    What lies between 0 and 1, a `share`, has it on the scale of logits: an AUROC that is high by
    luck seems more certain than it is, and the logit undoes that. At 0 or 1, where no resample
    differs, it is Wilson's with as many cases as there are patients. `benchmarks/coverage.py`
    measures how often these intervals hold the truth.

    Parameters
    ----------
    points : (rows,)
    samples : (rows, resamples)
    patients : (rows,), as `patients_behind` counts them
    """
    reach = stats.t.ppf((1 + LEVEL) / 2, np.maximum(patients, 2) - 1)
    if share:
        centre = logit(np.clip(points, EDGE, 1 - EDGE))
        error = standard_error(logit(np.clip(samples, EDGE, 1 - EDGE)), patients)
        low, high = expit(centre - reach * error), expit(centre + reach * error)
        flat_low, flat_high = wilson(points, np.maximum(patients, 1), reach)
        varies = error > 1e-9
        low = np.fmin(np.where(varies, low, flat_low), points)
        high = np.fmax(np.where(varies, high, flat_high), points)
    else:
        error = standard_error(samples, patients)
        low, high = points - reach * error, points + reach * error
    told = (patients >= FEWEST_PATIENTS) & ~np.isnan(points)
    return np.where(told, low, np.nan), np.where(told, high, np.nan)


def standard_error(samples: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Standard deviation over resamples, (rows,), made larger for few patients as that of a sample
    is.
    """
    n = np.maximum(patients, 2)
    # No warning where all are NaN.
    kept = np.where((patients >= FEWEST_PATIENTS)[:, None], samples, 0.0)
    return np.nanstd(kept, axis=-1) * np.sqrt(n / (n - 1))


def wilson(share, n, reach) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval (1927) of a share of `n` independent things; its end is the share itself at
    0 and 1.

    `reach` is the quantile of the normal distribution, or of Student's, at the interval's end.
    """
    shrink = 1 + reach**2 / n
    centre = (share + reach**2 / (2 * n)) / shrink
    half = reach / shrink * np.sqrt(share * (1 - share) / n + reach**2 / (4 * n**2))
    return np.where(share == 0, 0.0, centre - half), np.where(share == 1, 1.0, centre + half)


def with_interval(
    value: float, low: float, high: float, form: str = ".3f", *, without: str = "no interval"
) -> str:
    """ "0.842 (0.830 to 0.853)", for a sentence; in words where there is no interval, or no value."""
    if np.isnan(value):
        return "undefined"
    if np.isnan(low) or np.isnan(high):
        return f"{value:{form}} ({without})"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def paired_bootstrap(
    measure: Callable,
    labels: np.ndarray,
    scores: np.ndarray,
    others: np.ndarray,
    patients: np.ndarray,
    *,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Paired bootstrap: a measure of two sets of scores of the same images, in the same resamples
    of patients.

    Parameters
    ----------
    measure : callable
        Of (labels, scores, drawn, codes), the last two as of `draw_patients`, to the values of the
        findings, (14,), and those of each resample, (14, resamples).
    labels : (n, 14); a label may be NaN
    scores, others : what `measure` takes
    patients : (n,)

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns value, other, difference (value less other), low,
        high (of the difference), p and p_holm. p is of the difference over its bootstrap standard
        error, two-sided, by Student's t: below 0.05 where the 95 % interval leaves 0 out. p_holm is
        corrected over all rows that have a p (Holm 1979), so that of models that differ by chance
        only 5 % show any p_holm below 0.05. Below `FEWEST_PATIENTS` patients of a class interval
        and p are NaN.
    """
    drawn, codes = draw_patients(patients, resamples=resamples, seed=seed)
    points, samples = measure(labels, scores, drawn, codes)
    other_points, other_samples = measure(labels, others, drawn, codes)
    behind = patients_behind(labels, codes)
    difference, differences = with_mean(points - other_points), with_mean(samples - other_samples)
    low, high = interval_of(difference, differences, behind)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.abs(difference) / standard_error(differences, behind)
    ratio[difference == 0] = 0.0
    p = 2 * stats.t.sf(ratio, np.maximum(behind, 2) - 1)
    p[np.isnan(low)] = np.nan
    table = table_of_findings({"value": with_mean(points), "other": with_mean(other_points)})
    return table.assign(difference=difference, low=low, high=high, p=p, p_holm=holm(p))


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number, step down (Holm 1979). NaN is no test."""
    p = np.asarray(p, np.float64)
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    left = np.arange(len(order), 0, -1)  # how many p are as large or larger
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * left))
    return corrected


def half_width(deviation, n, *, level: float = LEVEL):
    """Half of Student's interval of a mean of n values with this standard deviation, NaN where n is
    1.
    """
    return stats.t.ppf((1 + level) / 2, np.maximum(n - 1, 1)) * deviation / np.sqrt(n)


def mean_of_seeds(values: pd.Series, *, level: float = LEVEL) -> dict:
    """Mean of a value per seed: effect, low, high, seeds. The interval is NaN for one seed."""
    values = values.dropna()
    n, mean = len(values), values.mean()
    half = half_width(values.std(), n, level=level) if n else np.nan
    return {"effect": mean, "low": mean - half, "high": mean + half, "seeds": n}


def over_seeds(rows: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Mean of `values` over the rows of each group, with its interval: NaN where there is one seed.

    Returns
    -------
    DataFrame
        Columns `by`, value, mean, low, high, seeds.
    """
    long = rows.melt(id_vars=list(by), value_vars=list(values), var_name="value", value_name="x")
    groups = long.dropna(subset="x").groupby([*by, "value"], sort=False)["x"]
    table = groups.agg(mean="mean", sd="std", seeds="count").reset_index()
    half = half_width(table.pop("sd"), table["seeds"])
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    return table


def has_learnt(auroc: float | None) -> bool:
    """Whether a mean AUROC is high enough for a gain or a loss to mean something: `LEARNT`.

    None is not.
    """
    return auroc is not None and bool(auroc >= LEARNT)


def nothing_learnt(auroc: float | None) -> str:
    """The reason for no verdict, where `has_learnt` is false or the interval of the AUROC holds
    chance.

    None, as JSON has NaN: no seed has all the trainings that are compared.
    """
    if auroc is None or np.isnan(auroc):
        return "no seed has all of the trainings that are compared"
    return f"nothing was learnt: a mean AUROC of {auroc:.3f} is below {LEARNT} or not apart from chance"


def verdict_on_gain(low: float, high: float) -> str:
    """The verdict on a gain that is claimed to be above 0, from its interval.

    NaN, as of one seed, leaves it open.
    """
    if low > 0:
        return REPRODUCED
    return CONTRADICTED if high < 0 else UNDECIDED


def percent_lost(baseline: pd.Series, other: pd.Series) -> dict:
    """How much of the skill above chance is lost: 100 (A0 - A) / (A0 - 0.5), with A0 the baseline's
    AUROC.

    The ratio of the two means over seeds. Its interval is Fieller's (1954), for paired normal
    values: every ratio r for which Student's t test finds the mean of (A0 - A) - r (A0 - 0.5) not
    apart from 0. It is finite exactly where the interval of A0 does not hold 0.5.

    Parameters
    ----------
    baseline, other : Series
        AUROC by seed. A seed that one of them lacks is left out of both.

    Returns
    -------
    dict
        baseline, its mean AUROC; loss, low, high (in %), seeds. The loss is NaN where nothing was
        learnt: the baseline is below `LEARNT`, or its interval holds 0.5. The interval is NaN for
        one seed too.
    """
    pairs = pd.DataFrame({"baseline": baseline, "other": other}).dropna()
    n, mean = len(pairs), pairs["baseline"].mean()
    found = {"baseline": mean, "loss": np.nan, "low": np.nan, "high": np.nan, "seeds": n}
    skill, lost = pairs["baseline"] - CHANCE, pairs["baseline"] - pairs["other"]
    mean_skill, mean_lost = skill.mean(), lost.mean()
    if not has_learnt(mean) or (n > 1 and mean_skill <= half_width(skill.std(), n)):
        return found
    found["loss"] = 100 * mean_lost / mean_skill
    if n == 1:
        return found
    # The ends solve a r^2 - 2 h r + c = 0.
    covariance = half_width(1.0, n) ** 2 * np.cov(skill, lost)
    a = mean_skill**2 - covariance[0, 0]
    h = mean_skill * mean_lost - covariance[0, 1]
    c = mean_lost**2 - covariance[1, 1]
    root = np.sqrt(max(h**2 - a * c, 0.0))
    return found | {"low": 100 * (h - root) / a, "high": 100 * (h + root) / a}
