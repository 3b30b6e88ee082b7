"""Seconds of the patient-clustered bootstrap at the size of the official test part, against a
scikit-learn loop.

python benchmarks/bootstrap.py

25,596 images of 2,797 patients, 14 findings at the release's frequencies, 1,000 resamples. The loop
calls `roc_auc_score` with weights for one resample and finding after another; it is timed on a few
and multiplied. Ours does the average precision as well, which the loop leaves out. One JSON line a
measurement.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

import numpy as np
from bench import peak_memory
from sklearn.metrics import roc_auc_score

from chexlib.evaluation.auroc import bootstrap_auroc

POSITIVES = (
    3279,
    1069,
    4658,
    6112,
    1748,
    1623,
    555,
    2665,
    1815,
    925,
    1093,
    435,
    1143,
    86,
)  # of the official test part


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--images", type=int, default=25596)
    options.add_argument("--patients", type=int, default=2797)
    options.add_argument("--resamples", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=5)
    asked = options.parse_args()
    rng = np.random.default_rng(0)
    patients = rng.integers(0, asked.patients, asked.images)
    labels = (rng.random((asked.images, 14)) < np.array(POSITIVES) / 25596).astype(float)
    scores = 1 / (1 + np.exp(-rng.normal(labels, 1.0)))
    ours, loop, few = [], [], 3
    for _ in range(asked.rounds):
        began = time.perf_counter()
        bootstrap_auroc(labels, scores, patients, resamples=asked.resamples)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(few):
            times = np.bincount(
                rng.integers(0, asked.patients, asked.patients), minlength=asked.patients
            )[patients]
            for finding in range(14):
                roc_auc_score(labels[:, finding], scores[:, finding], sample_weight=times)
        loop.append((time.perf_counter() - began) / few * asked.resamples)
    line = {"images": asked.images, "findings": 14, "resamples": asked.resamples}
    line |= {
        "seconds": round(statistics.median(ours), 3),
        "scikit_learn_seconds": round(statistics.median(loop), 1),
    }
    line["ratio"] = round(statistics.median(b / a for a, b in zip(ours, loop, strict=True)), 1)
    line["megabytes"] = round(peak_memory(resource.RUSAGE_SELF) / 2**20)
    print(json.dumps({**line, "rounds": [round(seconds, 3) for seconds in ours]}))


if __name__ == "__main__":
    main()
