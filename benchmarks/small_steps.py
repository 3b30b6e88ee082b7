"""Milliseconds of a training step of the quarter-width networks at 32 px, of this checkout and of
another, in turn in one process of one thread.

git worktree add --detach /tmp/before HEAD~1
python benchmarks/small_steps.py --before /tmp/before --topology densenet121

Prints one JSON line per checkout and batch: medians over rounds of CPU time, which other work on
the machine disturbs less than wall time; `ratio`, the median over rounds of the time before over
the time now; `nodes` of the step's graph; the CPU seconds of building, and of tracing with the
first step; and whether three updates from the same start left the same bits as this checkout's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

ONE = ("OMP_NUM_THREADS", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS")


def trainer_of(folder: Path, settings: dict):
    """The compiled trainer of a checkout; what another checkout imported is forgotten."""
    for name in [n for n in sys.modules if n.split(".")[0] == "chexlib"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    world = importlib.import_module("chexlib.collectives").World()
    config = importlib.import_module("chexlib.training.config").TrainConfig(**settings)
    make_trainer = importlib.import_module("chexlib.training.trainer").make_trainer
    trainer = make_trainer(config, world, accumulates=False)
    sys.path.pop(0)
    return trainer


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--topology", default="densenet121")
    options.add_argument("--before", type=Path, help="another checkout of this repository")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    options.add_argument("--schedule", default="", help="a named schedule, whose table is read")
    options.add_argument("--precision", default="float32")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--steps", type=int, default=5, help="steps of a round")
    asked = options.parse_args()
    os.environ.update(dict.fromkeys(ONE, "1"), TF_ENABLE_ONEDNN_OPTS="1")
    import numpy as np
    import tensorflow as tf

    settings = {"topology": asked.topology, "precision": asked.precision, "size": 32}
    settings |= {"width": 0.25, "stem": "small", "schedule": asked.schedule}
    settings |= {"data_dir": "none", "run_dir": "none"}
    rng = np.random.default_rng(0)

    def batch(images: int) -> tuple:
        pixels = rng.uniform(0, 255, (images, 32, 32, 1)).astype(np.float32)
        labels = (rng.random((images, 14)) < 0.2).astype(np.float32)
        return tf.constant(pixels), tf.constant(labels), tf.ones([images])

    def cpu(step, data: tuple, steps: int) -> float:
        began = time.process_time()
        for _ in range(steps):
            step(*data)
        return (time.process_time() - began) / steps

    folders = {"now": Path(__file__).resolve().parents[1]}
    if asked.before:
        folders["before"] = asked.before.resolve()
    steps, facts, weights = {}, {}, {}
    first = [batch(asked.batches[0]) for _ in range(3)]
    for name, folder in folders.items():
        began = time.process_time()
        trainer = trainer_of(folder, settings)
        built = time.process_time() - began
        step = tf.function(lambda *data, trainer=trainer: trainer.train_step(data), autograph=False)
        traced = cpu(step, first[0], 1)
        for data in first[1:]:
            step(*data)
        nodes = len(step.get_concrete_function(*first[0]).graph.get_operations())
        weights[name] = [v.numpy() for v in trainer.model.variables]
        same = all(map(np.array_equal, weights["now"], weights[name]))
        steps[name] = step
        facts[name] = {"nodes": nodes, "build_s": round(built, 1), "trace_s": round(traced, 1)}
        facts[name]["same_bits"] = same
    for images in asked.batches:
        data, times = batch(images), {name: [] for name in steps}
        for step in steps.values():
            cpu(step, data, 2)
        for _ in range(asked.rounds):
            for name, step in steps.items():
                times[name].append(1e3 * cpu(step, data, asked.steps))
        for name, found in times.items():
            line = {"topology": asked.topology, "batch": images, "what": name, **facts[name]}
            line["cpu_ms"] = round(statistics.median(found), 1)
            ratios = [b / a for a, b in zip(times["now"], found, strict=True)]
            print(json.dumps({**line, "ratio": round(statistics.median(ratios), 3)}), flush=True)


if __name__ == "__main__":
    main()
