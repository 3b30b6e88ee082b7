"""Do 95 % intervals hold the truth 95 % of the time, and how often are two models of equal worth called different?

python benchmarks/coverage.py

Patients have 1 to 20 images each, as often as in the NIH release; a finding comes back in a patient, and so do the
errors of the scores (correlation 0.5 within a patient). Scores are normal with variance 1 and a distance d between the
classes, so that the true AUROC is Phi(d / sqrt 2). *coverage*: share of trials whose interval holds it, for each
finding, and for comparison when images are resampled as if each were of another patient. *chance*: two models with the
same d, whose errors are alike but not the same; share of trials in which any of 14 findings or their mean is called
different, with Holm's correction and without. One JSON line a measurement.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from scipy.stats import norm

from chexlib.data.population import FILMS
from chexlib.evaluation.auroc import bootstrap_auroc
from chexlib.evaluation.paired import paired_difference
from chexlib.findings import FINDINGS

SHARES = np.geomspace(0.25, 0.02, len(FINDINGS))  # of images with the finding
AUROC = np.tile([0.6, 0.75, 0.9, 0.85, 0.7], 3)[: len(FINDINGS)]  # true, of each finding
NAIVE = 5  # every so many trials images are resampled, for comparison
WITHIN = 0.5  # correlation of errors, and of what decides a label, between images of a patient


def simulate(rng, n_patients: int, models: int):
    """Labels (n, 14), scores of each model (n, 14) and patients (n,)."""
    films = 1 + rng.choice(len(FILMS), n_patients, p=np.array(FILMS) / sum(FILMS))
    patients = np.repeat(np.arange(n_patients), films)

    def errors():
        own = rng.normal(size=(n_patients, len(FINDINGS)))[patients]
        return np.sqrt(WITHIN) * own + np.sqrt(1 - WITHIN) * rng.normal(size=(len(patients), len(FINDINGS)))

    labels = (errors() < norm.ppf(SHARES)).astype(float)
    shared = errors()
    alike = [np.sqrt(0.8) * shared + np.sqrt(0.2) * errors() for _ in range(models)]
    return labels, [np.sqrt(2) * norm.ppf(AUROC) * labels + error for error in alike], patients


def coverage(asked) -> None:
    rng, began = np.random.default_rng(asked.seed), time.perf_counter()
    truth = np.append(AUROC, AUROC.mean())
    held = {"patients": [], "images": []}
    positives, undefined = [], 0
    for trial in range(asked.trials):
        labels, (scores,), patients = simulate(rng, asked.patients, 1)
        units = {"patients": patients} | ({} if trial % NAIVE else {"images": np.arange(len(patients))})
        for unit, owners in units.items():
            table = bootstrap_auroc(labels, scores, owners, resamples=asked.resamples, seed=trial)
            inside = (table["low"] <= truth) & (truth <= table["high"])
            held[unit].append(inside.astype(float).where(table["low"].notna()))
        positives.append(table["positives"])
        undefined += held["patients"][-1].isna().sum()
    for i, finding in enumerate([*FINDINGS, "mean"]):
        line = {"what": "coverage", "finding": finding, "auroc": round(float(truth[i]), 4), "trials": asked.trials}
        line |= {"positives": float(np.median([row.iloc[i] for row in positives]))}
        for unit, rows in held.items():
            known = [row.iloc[i] for row in rows if not np.isnan(row.iloc[i])]
            line[f"{unit}_resampled"] = round(float(np.mean(known)), 4) if known else None
        print(json.dumps(line), flush=True)
    everything = np.array([row.to_numpy(float)[:-1] for row in held["patients"]])
    line = {"what": "coverage", "finding": "all 14", "patients_resampled": round(float(np.nanmean(everything)), 4)}
    line |= {"no_interval": int(undefined), "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(line), flush=True)


def chance(asked) -> None:
    rng, began = np.random.default_rng(asked.seed), time.perf_counter()
    corrected, uncorrected, single = 0, 0, []
    for trial in range(asked.pairs):
        labels, (one, other), patients = simulate(rng, asked.patients, 2)
        table = paired_difference(labels, one, other, patients, resamples=asked.resamples, seed=trial)
        corrected += bool((table["p_holm"] < 0.05).any())
        uncorrected += bool((table["p"] < 0.05).any())
        single.append((table["p"] < 0.05).mean())
    line = {"what": "chance", "trials": asked.pairs, "called_different": round(corrected / asked.pairs, 4)}
    line |= {"without_correction": round(uncorrected / asked.pairs, 4), "single_test": round(float(np.mean(single)), 4)}
    print(json.dumps({**line, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trials", type=int, default=2000, help="of the coverage; 0: none")
    options.add_argument("--pairs", type=int, default=500, help="of models that differ by chance; 0: none")
    options.add_argument("--patients", type=int, default=400)
    options.add_argument("--resamples", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    if asked.trials:
        coverage(asked)
    if asked.pairs:
        chance(asked)


if __name__ == "__main__":
    main()
