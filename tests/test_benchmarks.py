"""The benchmarks run, at a size that says nothing, and print what they promise."""

import json
import math
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from chexlib.files import ROOT
from chexlib.models.topologies import build_model
from chexlib.scaling.throughput import training_gflop

pytestmark = pytest.mark.cores


def lines_of(name, *options, **environment):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


SMALL = ("--topology", "vgg16", "--size", 32, "--batch-per-rank", 2, "--rounds", 2, "--steps", 2)


def test_the_training_step_is_measured_in_turns_with_its_peer():
    ours, stock, ratio = lines_of("train_step", *SMALL, "--ranks", 2, "--threads", 1)
    assert (ours["what"], stock["what"]) == ("chexlib 2x1", "stock Keras")
    assert len(ours["rounds"]) == 2 and min(*ours["rounds"], *stock["rounds"]) > 0
    assert ratio["what"] == "chexlib 2x1 over stock Keras"
    expected = [a / b for a, b in zip(ours["rounds"], stock["rounds"], strict=True)]
    assert ratio["ratio"] == pytest.approx(sum(expected) / 2, rel=0.02)
    spent = ours["images_per_second"] * ours["gflop_per_image"]
    assert ours["peak_fraction"] == pytest.approx(spent / ours["peak_gflops"], abs=0.002)


@pytest.mark.long
def test_weak_scaling_is_told_from_a_rank_alone_and_stock_keras_may_have_its_own_precision():
    found = {
        line["what"]: line
        for line in lines_of("train_step", *SMALL, "--weak", "--stock-precision", "bf16")
    }
    alone = found["chexlib 1x1"]["rounds"]
    for name, extra in {
        "chexlib 2x1": "",
        "2 ranks with nothing communicated": ", nothing communicated",
    }.items():
        weak = found[f"weak scaling, 1 to 2 ranks{extra}"]
        pairs = zip(found[name]["rounds"], alone, strict=True)
        assert weak["rounds"] == pytest.approx([two / (2 * one) for two, one in pairs], abs=0.01)
    assert {"chexlib 1x2", "stock Keras in mixed_bfloat16"} < set(found)


def test_end_to_end_reads_files_on_both_sides(phantom):
    ours, stock, ratio = lines_of("end_to_end", *SMALL, "--ranks", 1, "--data", phantom)
    assert ours["images"] == stock["images"] == 90
    assert ours["epoch_seconds"] == pytest.approx(90 / ours["images_per_second"], rel=0.01)
    assert ratio["ratio"] > 0 and ratio["cache_seconds"] > 0


@pytest.mark.long
def test_the_input_is_measured_against_its_peers():
    options = (
        "--size",
        32,
        "--source",
        64,
        "--images",
        130,
        "--rounds",
        1,
        "--batch-per-rank",
        2,
        "--steps",
        2,
    )
    what = ["build", "read", "training"]
    found = lines_of("input_pipeline", *what, *options, "--topology", "vgg16")
    assert [line["what"] for line in found] == what
    assert all(
        line["images_per_second"] > 0 and line["peer_images_per_second"] > 0 for line in found
    )
    assert all(line["lost"] == pytest.approx(1 - line["ratio"], abs=1e-3) for line in found[2:])


HOLDER = """
import sys, time
from bench import frozen_workers
worker = 'print("[0.1, 0.1]", flush=True); import time; time.sleep(600)'
with frozen_workers({"one": ([sys.executable, "-c", worker], {}, 1)}) as workers:
    print(workers["one"].process.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_benchmark_leaves_no_frozen_worker():
    command = [sys.executable, "-c", HOLDER]
    folder = ROOT / "benchmarks"
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as holder:
        worker = psutil.Process(int(holder.stdout.readline()))
        assert worker.status() == psutil.STATUS_STOPPED
        holder.send_signal(signal.SIGKILL)
    worker.wait(60)


def test_the_bootstrap_is_measured_against_scikit_learn():
    (line,) = lines_of(
        "bootstrap", "--images", 2000, "--patients", 200, "--resamples", 20, "--rounds", 1
    )
    assert line["ratio"] > 1 and line["seconds"] > 0


def test_coverage_and_chance_are_counted_over_trials():
    *held, compared, _, chance = lines_of(
        "coverage", "--trials", 8, "--pairs", 4, "--patients", 60, "--resamples", 30
    )
    kinds = {line["kind"] for line in held}
    assert {
        "AUROC",
        "AUROC, mean",
        "average precision",
        "difference of AUROC",
        "ppv",
    } < kinds
    assert {
        "difference of AUROC, mean of seeds",
        "pointing, IoU, IoBB",
    } < kinds
    assert {"mean over 3 seeds, gain", "what the wires cost"} < kinds
    for line in held:
        inside = line["coverage"] * line["intervals"]
        assert inside == pytest.approx(round(inside), abs=0.5)
        assert (line["told"] == "below 93 %") == (line["coverage"] < 0.93)
    assert (
        np.average(
            [line["coverage"] for line in held], weights=[line["intervals"] for line in held]
        )
        > 0.9
    )
    assert compared["trials"] == 4
    assert chance["trials"] == 4 and chance["called_different"] <= chance["without_correction"]


def test_a_cold_predict_is_timed_over_whole_processes(phantom, vgg_file):
    (line,) = lines_of(
        "cold_predict", "--data", phantom, "--weights", vgg_file, "--images", 3, "--rounds", 2
    )
    assert (line["topology"], line["size"], line["images"]) == ("vgg16", 32, 3)
    assert len(line["rounds"]) == 2 and line["seconds"] == pytest.approx(
        sum(line["rounds"]) / 2, abs=0.02
    )
    assert 0 < line["peak_gib"] < 4


def test_every_benchmark_is_listed():
    told = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"bench.py"}
    assert [name for name in sorted(scripts) if f"| `{name}` |" not in told] == []


def test_localization_prints_counts_beside_the_chance_level(phantom, vgg_file):
    *findings, everything, focal = lines_of(
        "localization", "--weights", vgg_file, "--data", phantom, "--all", "--cells", 4
    )
    assert everything["finding"] == "all" and focal["finding"] == "focal"
    assert everything["cases"] == sum(line["cases"] for line in findings)
    assert focal["cases"] == sum(line["cases"] for line in findings if line["chance"] < 0.1)


@pytest.mark.parametrize(
    ("topology", "gflop", "forward", "first"),
    [
        ("densenet121", 16.763, 2.833, 112**2 * 49 * 3 * 64),
        ("resnet50", 22.900, 3.856, 112**2 * 49 * 3 * 64),
        ("vgg16", 91.906, 15.347, 224**2 * 9 * 3 * 64),
    ],
)
def test_operations_of_a_step_are_three_forward_passes_less_the_gradient_of_the_pixels(
    topology, gflop, forward, first
):
    """Forward and the first convolution at 224 px, in multiply-adds (He et al. 2016 say 3.8e9)."""
    found = training_gflop(build_model(topology, size=224))
    assert found == pytest.approx(gflop, rel=1e-3)
    assert found == pytest.approx(2 * (3 * forward - first / 1e9), rel=1e-3)


def test_operations_of_one_layer_are_counted_by_hand():
    import keras

    inner = [
        keras.layers.Conv2D(8, 3, padding="same", strides=2),
        keras.layers.Flatten(),
        keras.layers.Dense(5),
    ]
    model = keras.Sequential([keras.Input((10, 10, 3)), *inner])
    assert math.isclose(training_gflop(model), (2 * 2 * 25 * 8 * 27 + 3 * 2 * 200 * 5) / 1e9)
