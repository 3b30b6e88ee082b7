"""Images per second of the training step: ours, stock Keras', PyTorch's, and the machine's matrix
peak, taking turns.

python benchmarks/train_step.py --topology densenet121                          # both layouts
against stock Keras make peer && python benchmarks/train_step.py --topology resnet50 --ranks 2
--threads 1      # and against PyTorch

Prints one JSON line for each thing that was measured. `images_per_second` is the median over
rounds, each round the median over its steps; `peak_fraction` is its floating-point operations (of
the convolutions and matrix products in the step's graph) over those of a large matrix product in
the same rounds; `ratio` is the median over rounds of our speed over the peer's in the same round.
Without --ranks and --threads two layouts are measured, one rank with all cores and one rank a core,
and the last line of each peer compares the best of ours with the best of its own. --weak measures
one rank of one thread too, alone on its core, and tells the efficiency of weak scaling from it to
one rank a core, and what is left of it where these ranks step at the same time and communicate
nothing: that loss is the machine's. --other PYTHON measures this very code in a second environment,
such as one with an older TensorFlow, and --mpi4py the same layouts where mpi4py and not Horovod
carries the ranks' sums. DenseNet-121 takes 3.4 GB per rank at 224 px, and all that is compared is
in memory at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from bench import WORKERS, frozen_workers, take_turns

from chexlib.machine import cores
from chexlib.models.topologies import TOPOLOGIES
from chexlib.mpi import find_mpi
from chexlib.scaling.throughput import command

PRECISIONS = {
    "float32": "float32",
    "fp32": "float32",
    "mixed_bfloat16": "mixed_bfloat16",
    "bf16": "mixed_bfloat16",
}


def parser(description: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of training share."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--topology", choices=TOPOLOGIES, default="densenet121")
    options.add_argument("--precision", choices=PRECISIONS, default="float32")
    options.add_argument(
        "--stock-precision", choices=PRECISIONS, help="stock Keras', if it is not to be that one"
    )
    options.add_argument("--ranks", type=int, default=0)
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--batch-per-rank", type=int, default=16)
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--steps", type=int, default=3, help="steps of a round")
    options.add_argument("--rounds", type=int, default=5)
    return options


def ours(settings: dict, ranks: int, threads: int) -> tuple:
    """Our step on `ranks` MPI ranks of `threads` threads."""
    return *command(settings, ranks=ranks, threads=threads), ranks * settings["batch_per_rank"]


def elsewhere(python: str, job: tuple) -> tuple:
    """`job`, one of `ours`, by another environment's Python and its MPI."""
    words, environment, images = job
    beside = {sys.executable: python, find_mpi().command: str(Path(python).with_name("mpiexec"))}
    here = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return [beside.get(word, word) for word in words], {**environment, **here}, images


def stock(settings: dict, precision: str | None = None) -> tuple:
    """Stock Keras in one process, with TensorFlow's own choice of threads and kernels."""
    settings = {**settings, "precision": PRECISIONS[precision or settings["precision"]]}
    return (
        [sys.executable, str(WORKERS / "stock_keras.py"), json.dumps(settings)],
        {},
        settings["batch_per_rank"],
    )


def stock_name(asked: argparse.Namespace) -> str:
    """What its lines call it: with its precision where that is another."""
    return "stock Keras" + (
        f" in {PRECISIONS[asked.stock_precision]}" if asked.stock_precision else ""
    )


def torch_ddp(python: str, settings: dict, ranks: int, threads: int) -> tuple:
    """PyTorch's DistributedDataParallel."""
    own = json.dumps({**settings, "ranks": ranks, "threads": threads})
    return [python, str(WORKERS / "torch_ddp.py"), own], {}, ranks * settings["batch_per_rank"]


def peak(precision: str) -> tuple:
    """Large matrix products with all cores, in what the step multiplies; its "images" are GFLOP."""
    product = "bfloat16" if precision == "mixed_bfloat16" else "float32"
    return (
        [sys.executable, str(WORKERS / "matrix_peak.py"), product],
        {"TF_ENABLE_ONEDNN_OPTS": "1"},
        2 * 2048**3 / 1e9,
    )


def main() -> None:
    options = parser(__doc__)
    peer = Path(__file__).parent / ".torch" / "bin" / "python"  # made by `make peer`
    options.add_argument(
        "--torch", default=str(peer) if peer.exists() else "", help="a Python that has PyTorch"
    )
    options.add_argument("--no-stock", action="store_true", help="leave stock Keras out")
    options.add_argument("--weak", action="store_true", help="one rank of one thread too")
    options.add_argument(
        "--other", default="", metavar="PYTHON", help="this code in another environment too"
    )
    options.add_argument("--mpi4py", action="store_true", help="the ranks' sums by mpi4py too")
    asked = options.parse_args()
    settings = {
        "topology": asked.topology,
        "precision": PRECISIONS[asked.precision],
        "size": asked.size,
        "batch_per_rank": asked.batch_per_rank,
    }
    given = asked.ranks or asked.threads
    ranks = asked.ranks or max(1, cores() // (asked.threads or 1))
    layouts = (
        [(ranks, asked.threads or max(1, cores() // ranks))]
        if given
        else [(1, cores()), (cores(), 1)]
    )
    jobs = {"peak": peak(settings["precision"])}
    if asked.weak and given:
        options.error("--weak measures layouts of its own. Leave out --ranks and --threads.")
    many, one = f"chexlib {cores()}x1", "chexlib 1x1"
    apart = f"{cores()} ranks with nothing communicated"
    jobs |= {f"chexlib {r}x{t}": ours(settings, r, t) for r, t in layouts}
    if asked.weak:
        jobs |= {one: ours(settings, 1, 1), apart: (*ours(settings, cores(), 1), -1)}
    if asked.other:
        jobs |= {f"other {r}x{t}": elsewhere(asked.other, ours(settings, r, t)) for r, t in layouts}
    for r, t in layouts if asked.mpi4py else []:
        words, environment, images = ours(settings, r, t)
        jobs[f"mpi4py {r}x{t}"] = (words, {**environment, "CHEXLIB_COLLECTIVES": "mpi4py"}, images)
    if not asked.no_stock:
        jobs[stock_name(asked)] = stock(settings, asked.stock_precision)
    if asked.torch:
        jobs |= {f"PyTorch {r}x{t}": torch_ddp(asked.torch, settings, r, t) for r, t in layouts}
    with frozen_workers(jobs) as workers:
        speeds = take_turns(workers, rounds=asked.rounds, steps=asked.steps)
        gflop = next(
            worker.facts["gflop_per_image"]
            for name, worker in workers.items()
            if name.startswith("chexlib")
        )
    gflops = statistics.median(speeds.pop("peak"))

    def best(who: str) -> str:
        return max(
            (n for n in speeds if n.startswith(who)),
            key=lambda name: statistics.median(speeds[name]),
        )

    def report(what: str, ratios: list[float]) -> None:
        line = {**settings, "what": what, "ratio": round(statistics.median(ratios), 3)}
        print(json.dumps({**line, "rounds": [round(ratio, 3) for ratio in ratios]}))

    mine = best("chexlib")
    for name, found in speeds.items():
        line = {**settings, "what": name, "images_per_second": round(statistics.median(found), 3)}
        line["rounds"] = [round(speed, 3) for speed in found]
        if name.startswith("chexlib"):
            line["gflop_per_image"], line["peak_gflops"] = round(gflop, 2), round(gflops, 1)
            line["peak_fraction"] = round(statistics.median(found) * gflop / gflops, 3)
        print(json.dumps(line))
    for peer in ("stock Keras", "PyTorch"):
        if any(name.startswith(peer) for name in speeds):
            other = best(peer)
            ratios = [a / b for a, b in zip(speeds[mine], speeds[other], strict=True)]
            report(f"{mine} over {other}", ratios)
    pairs = [(f"chexlib {r}x{t}", f"other {r}x{t}") for r, t in layouts if asked.other]
    pairs += [(f"mpi4py {r}x{t}", f"chexlib {r}x{t}") for r, t in layouts if asked.mpi4py]
    for first, second in pairs:
        report(
            f"{first} over {second}",
            [a / b for a, b in zip(speeds[first], speeds[second], strict=True)],
        )
    if asked.weak:
        for name, extra in ((many, ""), (apart, ", nothing communicated")):
            ratios = [a / (cores() * b) for a, b in zip(speeds[name], speeds[one], strict=True)]
            report(f"weak scaling, 1 to {cores()} ranks{extra}", ratios)


if __name__ == "__main__":
    main()
