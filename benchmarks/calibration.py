"""Does calibration fitted on validation lower the expected calibration error of the test part, seed
after seed?

python benchmarks/calibration.py                     # five trainings on a phantom
python benchmarks/calibration.py --data data/nih --size 224 --epochs 4

Each seed draws weights, order and mirroring anew; data and split are the same. One JSON line a
seed: the mean over findings of the error as trained, after each method, and what perfect
probabilities would have in such a sample; and the method that cross-fitting on validation chooses.
The last line counts the seeds in which each lowered the error.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import pandas as pd

from chexlib.app import runs
from chexlib.data.nih import data_name
from chexlib.evaluation.auroc import mean_auroc, part_of, split_in_words
from chexlib.evaluation.calibration import (
    METHODS,
    calibration_error,
    compare_calibrations,
    fit_calibration,
)
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.trainer import Reuse


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", default="", help="a folder in the NIH layout; a phantom without")
    options.add_argument("--images", type=int, default=10_000, help="of the phantom")
    options.add_argument("--difficulty", default="standard", help="of the phantom")
    options.add_argument("--topology", default="densenet121")
    options.add_argument("--size", type=int, default=32, help="side of the input in pixels")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--batch-per-rank", type=int, default=32)
    options.add_argument("--seeds", type=int, default=5)
    asked = options.parse_args()
    data = runs.data_folder(asked.data, images=asked.images, difficulty=asked.difficulty, seed=0)
    settings = {
        "topology": asked.topology,
        "size": asked.size,
        "epochs": asked.epochs,
        "split_seed": 0,
    }
    settings |= {"data_dir": str(data), "batch_size": asked.batch_per_rank, "keep_checkpoints": 0}
    reuse, better = Reuse(), dict.fromkeys((*METHODS, "chosen"), 0)
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            result = fit(TrainConfig(run_dir=folder, seed=seed, **settings), reuse=reuse)
            table = pd.read_parquet(result.predictions)
        known, labels, given = part_of(table, "validation")
        fitted = {m: fit_calibration(labels, given, known["patient"], method=m) for m in METHODS}
        chosen = compare_calibrations(labels, given, known["patient"]).idxmin()
        test, labels, scores = part_of(table, "test")
        line = {
            "data": data_name(data),
            "split": split_in_words(result.split),
            "topology": asked.topology,
        }
        line |= {"size": asked.size, "seed": seed, "auroc": round(mean_auroc(labels, scores), 3)}
        errors = {"as trained": scores} | {method: own(scores) for method, own in fitted.items()}
        for how, judged in errors.items():
            errors[how] = calibration_error(labels, judged, test["patient"]).loc["mean"]
            line[how] = {
                key: round(errors[how][key], 5)
                for key in ("rms", "rms_low", "rms_high", "ece", "brier")
            }
        line["chance"] = round(errors["as trained"]["ece_chance"], 5)
        line["chosen"] = chosen
        for name in better:
            better[name] += bool(
                errors[chosen if name == "chosen" else name]["ece"] < errors["as trained"]["ece"]
            )
        print(json.dumps(line), flush=True)
    print(json.dumps({"seeds": asked.seeds, "error is lower in": better}))


if __name__ == "__main__":
    main()
