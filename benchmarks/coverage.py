"""Do 95 % intervals hold the truth 95 % of the time, and how often is chance called a difference?

python benchmarks/coverage.py

Every kind of interval that the project prints, with the function that makes it:

| kind | function | where it is printed |
| --- | --- | --- |
| AUROC of a finding, and of their mean | `auroc.bootstrap_auroc` | 03, 04, 09, `evaluate`, subgroups |
| average precision of a finding | `auroc.bootstrap_auroc` | 03, 04, 09, `evaluate` |
| difference of AUROC, same images | `auroc.paired_difference` | 04, 09, leakage, `evaluate` |
| difference of AUROC, mean of seeds | `cross_validation.arm_gains` | real model |
| sensitivity, specificity, PPV, NPV | `operating.share` | 09 |
| pointing game, IoU, IoBB | `operating.share` | 09, `localization.py` |
| mean over seeds or rounds | `intervals.mean_of_seeds`, `over_seeds` | 05, 06, 07, 08 |
| what the wires cost | `wires.fit_wires` | 08 |

The mean average precision has none, as it is biased. The interval of a change of the Brier score in
09 is SciPy's. Spans
that are no intervals: of rounded figures, of the lowest and highest round, of a projection's
assumptions. The ledger scales intervals of the notebooks.

Patients have 1 to 20 images each, as often as in the NIH release; a finding comes back in a
patient, and so do the errors of the scores (correlation 0.5 within a patient). Scores are normal
with variance 1 and a distance d between the classes, so that the true AUROC is Phi(d / sqrt 2). One
JSON line a kind and range of patients (effective
number, `intervals.effective_number`, of the smaller class): *coverage*, the share of intervals
that hold the truth, and *told*, "below 93 %" or "above 98 %".

*chance*: two models of equal worth; share of trials in which any of 14 findings or their mean is
called different, with Holm's correction and without. *compare*: the same of `chexlib compare`
between two runs with patients of their own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import norm

from benchmarks.lab.wires import LAUNCH, fit_wires, launches, wire_seconds
from chexlib.app.reference import difference_p, estimates
from chexlib.evaluation.auroc import bootstrap_auroc, paired_difference
from chexlib.evaluation.intervals import effective_number, holm, mean_of_seeds, patients_behind
from chexlib.evaluation.operating import share
from chexlib.findings import FINDINGS
from chexlib.phantom.population import FILMS
from examples.real_model.cross_validation import arm_gains

SHARES = np.geomspace(0.25, 0.02, len(FINDINGS))  # of images with the finding
AUROC = np.tile([0.6, 0.75, 0.9, 0.97, 0.85], 3)[: len(FINDINGS)]  # true, of each finding
APART = np.sqrt(2) * norm.ppf(AUROC)  # distance of the classes
WORSE = 0.8  # of this distance, the other model's where two are not alike
WITHIN = 0.5  # correlation of errors, and of what decides a label, between images of a patient
RANGES = (5, 8, 15, 40, 100, np.inf)  # effective patients
THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9)  # of overlap
GRID = np.linspace(-8, 12, 20_001)  # of scores, for what is true


class Tally:
    """How many intervals of each kind and range hold the truth."""

    def __init__(self):
        self.held = defaultdict(list)

    def add(self, kind: str, truth, low, high, patients) -> None:
        rows = np.broadcast_arrays(*(np.asarray(x, float) for x in (truth, low, high, patients)))
        for true, one, other, n in zip(*(np.ravel(row) for row in rows), strict=True):
            if not np.isnan([true, one, other]).any():
                place = -1 if np.isnan(n) else int(np.searchsorted(RANGES, n, side="right"))
                self.held[kind, place].append(one - 1e-12 <= true <= other + 1e-12)

    def tell(self) -> None:
        edges = ("below 5", *(f"{a} to {b}" for a, b in pairwise(RANGES)), "")
        for (kind, place), held in sorted(self.held.items()):
            share = np.mean(held)
            told = "below 93 %" if share < 0.93 else "above 98 %" if share > 0.98 else ""
            counts = {
                "kind": kind,
                "patients": edges[place].replace(" to inf", " and more"),
                "intervals": len(held),
            }
            print(
                json.dumps(
                    {"what": "coverage", **counts, "coverage": round(float(share), 4), "told": told}
                ),
                flush=True,
            )


def owners(rng, n_patients: int) -> np.ndarray:
    films = 1 + rng.choice(len(FILMS), n_patients, p=np.array(FILMS) / sum(FILMS))
    return np.repeat(np.arange(n_patients), films)


def alike(rng, patients: np.ndarray, columns: int) -> np.ndarray:
    """Standard normal numbers (images, columns), correlated within a patient."""
    own = rng.normal(size=(patients.max() + 1, columns))[patients]
    return np.sqrt(WITHIN) * own + np.sqrt(1 - WITHIN) * rng.normal(size=own.shape)


def simulate(rng, n_patients: int, *distances: np.ndarray):
    """Labels (n, 14), scores (n, 14) of a model for each distance of the classes, and patients
    (n,).
    """
    patients = owners(rng, n_patients)
    labels = (alike(rng, patients, len(FINDINGS)) < norm.ppf(SHARES)).astype(float)
    shared = alike(rng, patients, len(FINDINGS))
    errors = (
        np.sqrt(0.8) * shared + np.sqrt(0.2) * alike(rng, patients, len(FINDINGS))
        for _ in distances
    )
    return (
        labels,
        [apart * labels + error for apart, error in zip(distances, errors, strict=True)],
        patients,
    )


def true_values() -> dict[str, np.ndarray]:
    """Average precision of each finding in the whole population."""
    grid = GRID[:, None]
    up, down = SHARES * norm.pdf(grid - APART), (1 - SHARES) * norm.pdf(grid)
    step = GRID[1] - GRID[0]
    above = [np.cumsum(part[::-1], axis=0)[::-1] for part in (up, down)]
    found = {"ap": (above[0] / (above[0] + above[1]) * up).sum(axis=0) * step / SHARES}
    return found


def with_mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of the findings, and their mean over those that are known."""
    return np.append(values, values[known].mean())


def predictions(labels, scores, patients) -> pd.DataFrame:
    frame = pd.DataFrame({"image": np.arange(len(patients)), "patient": patients, "part": "test"})
    for kind, values in (("label", labels), ("score", scores)):
        frame[[f"{kind}_{finding}" for finding in FINDINGS]] = values
    return frame


def cohort(
    rng, tally: Tally, truth: dict, n_patients: int, resamples: int, seed: int
) -> pd.DataFrame:
    """All intervals over patients of one test part, of which the table of AUROC is given back."""
    labels, (scores, same, worse), patients = simulate(rng, n_patients, APART, APART, WORSE * APART)
    asked, behind = {"resamples": resamples, "seed": seed}, patients_behind(labels, patients)
    table = bootstrap_auroc(labels, scores, patients, **asked)
    known = table["auroc"].notna().to_numpy()[:-1]
    tally.add("AUROC", AUROC, table["low"][:-1], table["high"][:-1], behind[:-1])
    tally.add(
        "AUROC, mean",
        with_mean(AUROC, known)[-1],
        table["low"].iloc[-1],
        table["high"].iloc[-1],
        behind[-1],
    )
    tally.add(
        "average precision", truth["ap"], table["ap_low"][:-1], table["ap_high"][:-1], behind[:-1]
    )
    lost = AUROC - norm.cdf(WORSE * APART / np.sqrt(2))
    for other, true in ((same, 0 * lost), (worse, lost)):
        found = paired_difference(labels, scores, other, patients, **asked)
        tally.add(
            "difference of AUROC", with_mean(true, known), found["low"], found["high"], behind
        )
    arms = [
        [predictions(labels, own, patients) for own in two]
        for two in ((scores, same), (worse, worse))
    ]
    found = arm_gains(*arms, fewest=0, **asked)
    tally.add(
        "difference of AUROC, mean of seeds",
        with_mean(lost, known),
        found["low"],
        found["high"],
        behind,
    )

    rates(tally, labels, scores, patients)
    return table


def rates(tally: Tally, labels, scores, patients) -> None:
    """Sensitivity and so on at thresholds that are given, as those of a validation part are."""
    ninety = norm.ppf(0.9)
    at = (APART / 2, APART - ninety, np.full(len(FINDINGS), ninety))
    for i in range(len(FINDINGS)):
        y = labels[:, i] == 1
        for own in at:
            called = scores[:, i] >= own[i]
            found, mistaken = norm.cdf(APART[i] - own[i]), 1 - norm.cdf(own[i])
            tp, fp = SHARES[i] * found, (1 - SHARES[i]) * mistaken
            fn, tn = SHARES[i] - tp, 1 - SHARES[i] - fp
            for rate, right, among, true in (
                ("sensitivity", called, y, found),
                ("specificity", ~called, ~y, 1 - mistaken),
                ("ppv", y, called, tp / (tp + fp)),
                ("npv", ~y, ~called, tn / (tn + fn)),
            ):
                _, low, high = share(right[among], patients[among])
                tally.add(rate, true, low, high, effective_number(patients[among]))


def pointing(rng, tally: Tally, n_patients: int) -> None:
    """Boxes of two findings: half of the patients have the one, all the other."""
    for n in (n_patients, max(n_patients // 2, 5)):
        patients = owners(rng, n)
        p = rng.choice([0.1, 0.3, 0.5, 0.8, 0.95])
        place = norm.cdf(alike(rng, patients, 1)[:, 0])  # uniform
        for right, true in ((place < p, p), *((1 - place > t, 1 - t) for t in THRESHOLDS)):
            _, low, high = share(right, patients)
            tally.add("pointing, IoU, IoBB", true, low, high, effective_number(patients))


def seeds(rng, tally: Tally, trials: int) -> None:
    """Means of AUROC over trainings, and of gains, each training's on the scale of logits normal."""
    true = expit(logit(0.75) + 0.3 * rng.normal(size=200_000)).mean()
    for _ in range(trials):
        for n in (2, 3, 5):
            values = expit(logit(0.75) + 0.3 * rng.normal(size=(2, n)))
            for kind, x, mean in (("AUROC", values[0], true), ("gain", values[0] - values[1], 0.0)):
                found = mean_of_seeds(pd.Series(x))
                tally.add(f"mean over {n} seeds, {kind}", mean, found["low"], found["high"], np.nan)


def wires(rng, tally: Tally, trials: int) -> None:
    """Times of steps on emulated hosts, 1 % off each and 1 % off each launch."""
    sizes = {"one": 3e7, "two": 9e7}
    truth = {"latency": 4e-4, "payload": 0.93, "handling": 2e-9, "copying": 1.5e-9}
    points = launches(["one", "two"], [2, 3, 4], size=64, batch=2)
    rows = pd.DataFrame(
        [{**point, "rate": rate, "compute": 0.3} for point in points for rate in (1e8, 1e9, 1e10)]
    )
    exact = [
        wire_seconds(row, sizes[row["topology"]], truth, processors=2)
        for row in rows.to_dict("records")
    ]
    launch = rows.groupby(LAUNCH, sort=False).ngroup().to_numpy()
    for _ in range(trials):
        noise = rng.normal(0, 0.01, launch.max() + 1)[launch] + rng.normal(0, 0.01, len(rows))
        unknowns, _ = fit_wires(rows.assign(seconds=exact * (1 + noise)), sizes, processors=2)
        tally.add(
            "what the wires cost", list(truth.values()), unknowns["low"], unknowns["high"], np.nan
        )


def coverage(asked) -> None:
    rng, began, tally, truth = (
        np.random.default_rng(asked.seed),
        time.perf_counter(),
        Tally(),
        true_values(),
    )
    called, pairs = 0, 0
    for n_patients in asked.patients:
        before = None
        for trial in range(asked.trials):
            table = cohort(rng, tally, truth, n_patients, asked.resamples, trial)
            pointing(rng, tally, max(n_patients // 10, 5))
            now = dict(estimates(json.loads(table.to_json(orient="index"))))
            if before:
                p = holm(
                    np.array(
                        [
                            difference_p(before[name], now[name], [])
                            for name in now
                            if name in before
                        ]
                    )
                )
                called, pairs = called + bool((p < 0.05).any()), pairs + 1
            before = None if before else now
    seeds(rng, tally, 10 * asked.trials)
    wires(rng, tally, asked.trials // 4)
    tally.tell()
    if pairs:
        print(
            json.dumps(
                {"what": "compare", "trials": pairs, "called_different": round(called / pairs, 4)}
            )
        )
    print(
        json.dumps({"what": "time", "seconds": round(time.perf_counter() - began, 1)}), flush=True
    )


def chance(asked) -> None:
    rng, began = np.random.default_rng(asked.seed), time.perf_counter()
    corrected, uncorrected, single = 0, 0, []
    for trial in range(asked.pairs):
        labels, (one, other), patients = simulate(rng, max(asked.patients), APART, APART)
        table = paired_difference(
            labels, one, other, patients, resamples=asked.resamples, seed=trial
        )
        corrected += bool((table["p_holm"] < 0.05).any())
        uncorrected += bool((table["p"] < 0.05).any())
        single.append((table["p"] < 0.05).mean())
    line = {
        "what": "chance",
        "trials": asked.pairs,
        "called_different": round(corrected / asked.pairs, 4),
    }
    line |= {
        "without_correction": round(uncorrected / asked.pairs, 4),
        "single_test": round(float(np.mean(single)), 4),
    }
    print(json.dumps({**line, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--trials", type=int, default=200, help="of each number of patients; 0: no coverage"
    )
    options.add_argument(
        "--pairs", type=int, default=500, help="of models that differ by chance; 0: none"
    )
    options.add_argument("--patients", type=int, nargs="+", default=[60, 150, 400])
    options.add_argument("--resamples", type=int, default=300)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    if asked.trials:
        coverage(asked)
    if asked.pairs:
        chance(asked)


if __name__ == "__main__":
    main()
