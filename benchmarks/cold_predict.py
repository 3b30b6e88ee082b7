"""Seconds of `python -m chexlib predict` from nothing: a new process that reads, scores and prints
23 radiographs.

python benchmarks/cold_predict.py --data DIR                       # an untrained DenseNet-121 of
224 px python benchmarks/cold_predict.py --data DIR --weights model.keras

DIR holds images at any depth. The interpreter's start, the import of TensorFlow and the building of
the network are in the seconds; files are in the page cache after the first round. One JSON line:
the median over rounds, all of them, and the largest memory that a process of it took (making
untrained weights is one too).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import peak_memory

from chexlib.data.pictures import find_pictures
from chexlib.machine import cores
from chexlib.models.weights import read_card


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", required=True, help="a folder of images")
    options.add_argument(
        "--weights", default="", help="a model.keras; an untrained network without"
    )
    options.add_argument("--topology", default="densenet121", help="of the untrained network")
    options.add_argument("--size", type=int, default=224, help="side of its input in pixels")
    options.add_argument("--images", type=int, default=23)
    options.add_argument("--rounds", type=int, default=5)
    asked = options.parse_args()
    images = find_pictures([asked.data])[: asked.images]
    with tempfile.TemporaryDirectory() as folder:
        weights = asked.weights or fresh(Path(folder) / "model.keras", asked.topology, asked.size)
        command = [
            sys.executable,
            "-m",
            "chexlib",
            "predict",
            *images,
            "--weights",
            str(weights),
            "--json",
        ]
        seconds = []
        for _ in range(asked.rounds):
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, encoding="utf-8")
            seconds.append(time.perf_counter() - began)
            if done.returncode:
                sys.exit(done.stderr)
        card = read_card(weights)
    line = {
        "what": "cold predict",
        "topology": card["topology"],
        "size": card["size"],
        "cores": cores(),
    }
    line |= {
        "images": len(json.loads(done.stdout)["probabilities"]),
        "seconds": round(statistics.median(seconds), 2),
    }
    peak = peak_memory(resource.RUSAGE_CHILDREN) / 2**30
    print(
        json.dumps(
            {**line, "rounds": [round(value, 2) for value in seconds], "peak_gib": round(peak, 2)}
        )
    )


def fresh(path: Path, topology: str, size: int) -> Path:
    """Weights as they are drawn, made by a process of its own, so that this one stays small."""
    code = "import sys; from chexlib.models.weights import create_model, save_model\n"
    code += "path, topology, size = sys.argv[1:]\n"
    code += "save_model(create_model(topology, size=int(size)), path, card={'topology': topology, 'size': int(size)})"
    subprocess.run(
        [sys.executable, "-c", code, str(path), topology, str(size)],
        check=True,
        capture_output=True,
    )
    return path


if __name__ == "__main__":
    main()
