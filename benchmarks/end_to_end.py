"""From PNG files to trained weights: an epoch with stock Keras and a Python loader, and ours,
taking turns.

python benchmarks/end_to_end.py --data DIR --topology densenet121       # DIR in the NIH layout; a
phantom without

The study's comparison: 85 s an epoch with stock Keras, 18 s with tuned TensorFlow. Rounds are parts
of an epoch of --steps steps, all of their time counted: input, step, and Keras' own work. Ours
reads the cache, the build of which is told apart. One JSON line for each, and one for the ratio.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench import frozen_workers, take_turns
from train_step import PRECISIONS, ours, parser, stock, stock_name

from chexlib.data.cache import FOLDER, ImageStore
from chexlib.data.nih import load_radiographs
from chexlib.machine import cores
from chexlib.phantom.write import write_phantom


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(steps=8)
    options.add_argument("--data", default="", help="a folder in the NIH layout")
    asked = options.parse_args()
    ranks = asked.ranks or cores()
    threads = asked.threads or max(1, cores() // ranks)
    with tempfile.TemporaryDirectory() as folder:
        data = asked.data or write_phantom(Path(folder) / "phantom", n_images=400, size=256)
        os.environ[FOLDER] = f"{folder}/cache"
        paths = load_radiographs(data).table["path"].tolist()
        began = time.perf_counter()
        ImageStore(paths, size=asked.size)
        build = time.perf_counter() - began
        settings = {
            "topology": asked.topology,
            "size": asked.size,
            "batch_per_rank": asked.batch_per_rank,
        }
        settings["precision"] = PRECISIONS[asked.precision]
        files = {**settings, "paths": paths}
        mine = f"chexlib {ranks}x{threads}"
        theirs = f"{stock_name(asked)}, Python loader"
        jobs = {mine: ours(files, ranks, threads), theirs: stock(files, asked.stock_precision)}
        with frozen_workers(jobs) as workers:
            speeds = take_turns(workers, rounds=asked.rounds, steps=asked.steps, of=statistics.mean)
    facts = {**settings, "data": Path(data).name, "images": len(paths)}
    for name, found in speeds.items():
        speed = statistics.median(found)
        line = {
            **facts,
            "what": name,
            "images_per_second": round(speed, 3),
            "epoch_seconds": len(paths) / speed,
        }
        print(json.dumps({**line, "rounds": [round(value, 3) for value in found]}))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    line = {
        **facts,
        "what": "ratio",
        "ratio": round(statistics.median(ratios), 3),
        "cache_seconds": round(build, 2),
    }
    print(json.dumps({**line, "rounds": [round(ratio, 3) for ratio in ratios]}))


if __name__ == "__main__":
    main()
