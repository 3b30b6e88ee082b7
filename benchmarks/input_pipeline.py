"""Images per second of the input: the cache's build, reading it, and what training loses to it; and
its memory.

python benchmarks/input_pipeline.py                 # all measurements
python benchmarks/input_pipeline.py read --size 224

build    decode and shrink PNGs of --source px into an empty cache, against one thread that does the
same with Pillow read     training batches from the cache, without training, against tf.data that
decodes and resizes the PNGs training steps with batches from the cache against the same steps with
one batch in memory: the share that is lost memory   peak of a build and of an epoch's reading for
1,000 and for 20,000 images, each in a process of its own

Prints one JSON line a measurement; rounds alternate, figures are medians over rounds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from train_step import PRECISIONS, parser

MEASUREMENTS = ("build", "read", "training", "memory")
BUILD = """
import sys
from chexlib.data.cache import ImageStore
store = ImageStore(sys.stdin.read().split("\\n"), size=int(sys.argv[1]))
"""
EPOCH = """
import numpy as np
from chexlib.data.pipeline import training_batches
labels = np.zeros((len(store), 14), np.float32)
for batch in training_batches(store, labels, global_batch=64, seed=0).take(-(-len(store) // 64)):
    pass
"""
# Not Linux' ru_maxrss, which begins with what the parent had when it started this process.
PEAK = (
    "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
)
if sys.platform == "darwin":  # which counts in bytes
    PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
WORK = {"build": BUILD + PEAK, "epoch": BUILD + EPOCH + PEAK}


def phantom(folder: Path, n: int, size: int) -> list[str]:
    """Paths of `n` phantom radiographs: up to 200 different ones, and copies of them with one pixel
    changed.
    """
    from PIL import Image

    from chexlib.data.nih import read_image
    from chexlib.phantom.write import write_phantom

    root = folder / f"phantom-{size}"
    if not root.exists():
        write_phantom(root, n_images=200, size=size)
    paths = sorted(map(str, root.rglob("*.png")))
    for i in range(len(paths), n):
        image = read_image(paths[i % 200]).copy()
        image[0, :4] = list(i.to_bytes(4, "little"))
        paths.append(str(root / f"z-{i:06d}.png"))
        Image.fromarray(image).save(paths[-1])
    return paths[:n]


def build(paths: list[str], size: int, rounds: int) -> dict:
    """Images per second of a build, and of Pillow in one thread on as many as take a few seconds."""
    from chexlib.data.cache import FOLDER, ImageStore, resize_area
    from chexlib.data.nih import read_image

    ours, peer = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            os.environ[FOLDER] = folder
            began = time.perf_counter()
            ImageStore(paths, size=size)
            ours.append(len(paths) / (time.perf_counter() - began))
        began = time.perf_counter()
        for path in paths[:100]:
            resize_area(read_image(path), size)
        peer.append(len(paths[:100]) / (time.perf_counter() - began))
    return compared(ours, peer, "Pillow in one thread")


def read(paths: list[str], size: int, batch: int, rounds: int) -> dict:
    """Images per second of an epoch's batches, mirrored and as float32, from the cache."""
    import tensorflow as tf

    from chexlib.data.cache import ImageStore
    from chexlib.data.pipeline import training_batches

    def decoded(path):
        image = tf.io.decode_png(tf.io.read_file(path), channels=1)
        return tf.image.random_flip_left_right(tf.image.resize(image, (size, size), method="area"))

    store, labels = ImageStore(paths, size=size), np.zeros((len(paths), 14), np.float32)
    steps, ours, peer = len(paths) // batch, [], []
    files = (
        tf.data.Dataset.from_tensor_slices(paths)
        .shuffle(len(paths))
        .map(decoded, tf.data.AUTOTUNE)
        .batch(batch)
    )
    for epoch in range(rounds):
        batches = training_batches(store, labels, global_batch=batch, seed=0, first_epoch=epoch)
        ours.append(batch * steps / timed(batches.take(steps)))
        few = min(steps, 20)
        peer.append(batch * few / timed(files.prefetch(2).take(few)))
    return compared(ours, peer, "tf.data decoding PNGs")


def training(source, asked, *, skip: int, steps: int) -> dict:
    """Steps fed from `source` against steps fed from memory, one process, all cores; each round
    skips its beginning.
    """
    import keras
    import tensorflow as tf

    from chexlib.collectives import World
    from chexlib.models.data_parallel import DataParallelTrainer
    from chexlib.models.weights import create_model
    from chexlib.training.optimizers import FusedAdam

    batch, size = asked.batch_per_rank, asked.size
    trainer = DataParallelTrainer(
        create_model(asked.topology, size=size, precision=PRECISIONS[asked.precision]), World()
    )
    trainer.compile(optimizer=FusedAdam(1e-4), jit_compile=False)
    memory = tf.data.Dataset.from_tensors(next(iter(source.take(1)))).cache().repeat()
    sources, speeds = {"ours": source, "memory": memory}, {"ours": [], "memory": []}
    for round_ in range(asked.rounds + 1):
        for name, batches in sources.items():
            ends = []
            clock = keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs, ends=ends: ends.append(time.perf_counter())
            )
            trainer.fit(
                batches, steps_per_epoch=skip + steps, callbacks=[clock], verbose=0, shuffle=False
            )
            if round_:  # the first is for tracing
                speeds[name].append(batch * steps / (ends[-1] - ends[skip - 1]))
    line = compared(speeds["ours"], speeds["memory"], "one batch in memory")
    return {**line, "topology": asked.topology, "lost": round(1 - line["ratio"], 4)}


def cached(paths: list[str], asked):
    """Batches from the cache, for `training`."""
    from chexlib.data.cache import ImageStore
    from chexlib.data.pipeline import training_batches

    store, labels = ImageStore(paths, size=asked.size), np.zeros((len(paths), 14), np.float32)
    return training_batches(store, labels, global_batch=asked.batch_per_rank, seed=0)


def peak_memory(scratch: Path, n: int, size: int) -> dict:
    """MB that a process of its own has at most, of a build and of an epoch's reading."""
    paths, found = phantom(scratch, n, 128), {}
    for work, script in WORK.items():
        environment = {**os.environ, "CHEXLIB_CACHE": str(scratch / f"cache-{n}")}
        command = [sys.executable, "-c", script, str(size)]
        done = subprocess.run(
            command, env=environment, input="\n".join(paths), capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found[work] = round(int(done.stdout) / 1024, 1)
    return found


def timed(batches) -> float:
    """Seconds that it takes to see all of them."""
    began = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - began


def compared(ours: list[float], peer: list[float], who: str) -> dict:
    """A line of the result."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    line = {
        "images_per_second": statistics.median(ours),
        "peer": who,
        "peer_images_per_second": statistics.median(peer),
    }
    return {
        **line,
        "ratio": round(statistics.median(ratios), 4),
        "rounds": [round(speed, 1) for speed in ours],
    }


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(size=64)
    options.add_argument("what", nargs="*", help="of build, read, training, memory; all without")
    options.add_argument(
        "--source", type=int, default=1024, help="side of the PNGs, where they are decoded"
    )
    options.add_argument("--images", type=int, default=0, help="how many images")
    asked = options.parse_args()
    scratch = (
        Path(os.environ.get("CHEXLIB_BENCHMARK", tempfile.gettempdir()))
        / f"chexlib-input-{os.getuid()}"
    )
    scratch.mkdir(parents=True, exist_ok=True)
    for name in asked.what or MEASUREMENTS:
        if name == "build":
            found = build(
                phantom(scratch, asked.images or 400, asked.source), asked.size, asked.rounds
            )
        elif name == "read":
            os.environ["CHEXLIB_CACHE"] = str(scratch / "cache")
            found = read(phantom(scratch, asked.images or 4000, 256), asked.size, 64, asked.rounds)
        elif name == "training":
            os.environ["CHEXLIB_CACHE"] = str(scratch / "cache")
            source = cached(phantom(scratch, asked.images or 1000, 256), asked)
            steps = max(asked.steps, 3 * (asked.images or 1000) // asked.batch_per_rank // 10)
            found = training(source, asked, skip=1, steps=steps)
        elif name == "memory":
            few, many = (peak_memory(scratch, n, asked.size) for n in (1000, 20000))
            found = {f"{w}_megabytes": {"1000": few[w], "20000": many[w]} for w in WORK}
            found |= {f"{w}_ratio": round(many[w] / few[w], 3) for w in WORK}
        else:
            options.error(f"{name!r} is none of {', '.join(MEASUREMENTS)}")
        print(json.dumps({"what": name, "size": asked.size, **found}), flush=True)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
