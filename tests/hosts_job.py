"""What tests/cluster/test_hosts.py runs: on engines, as the "notebook" of host A (`python hosts_job.py
JOB`), and as Slurm.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

MARKER = "quartz-zebra-0815-quartz"


@contextmanager
def notebook(hosts, folder, **job):
    """`main(**job)` on host A. `told(word)` waits for its line that has this word."""
    job = {"agent": hosts.agent, "shared": str(hosts.folder), "marker": MARKER, **job}
    command = hosts.a.wrap([sys.executable, __file__, json.dumps(job)])
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def told(word):
        for line in process.stdout:
            if line.startswith("{") and word in (seen := json.loads(line)):
                return seen
        raise AssertionError(f"no word of {word!r}: {(folder / 'stderr').read_text()[-3000:]}")

    def end():
        for host in (hosts.a, hosts.b):
            for pid in host.processes():
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(150, end)
    timer.start()
    try:
        yield told
    finally:
        timer.cancel()
        end()
        process.communicate()


def main(agent, shared, marker, clear=False, data_dir="", run_dir="", hold=False):
    """Start an engine on each host, work, and print what was seen, a line of JSON each."""
    from chexlib.cluster.engines import CONTROLLER, mpi_engines
    from chexlib.cluster.sites import find_site
    from chexlib.errors import ClusterError

    if clear:
        CONTROLLER.remove("--IPController.enable_curve=True")
    options = ["--prtemca", "plm_ssh_agent", agent]
    site = find_site(["hostA:1", "hostB:1"], interface="veth0", options=options, shared=shared)
    with mpi_engines(2, threads=1, site=site) as engines:
        details = json.loads(
            Path(engines.cluster.controller.connection_files["client"]).read_text()
        )
        keys = [details[name] for name in ("key", "curve_serverkey") if details.get(name)]
        say(
            hosts=[who["host"] for who in engines.identities],
            keys=keys,
            folder=engines.folder,
            html=engines._repr_html_(),
        )
        say(echo=engines.run(echo, marker))
        if data_dir:
            say(steps=engines.run(twenty_steps, data_dir))
            say(fit=train(engines, data_dir, run_dir))
        if hold:
            try:
                engines.run(hang, report=lambda told: say(**told))
            except ClusterError as error:
                say(error=str(error))
    say(ended=True)


def say(**told):
    print(json.dumps(told), flush=True)


def train(engines, data_dir, run_dir):
    from chexlib.training.config import TrainConfig
    from chexlib.training.fit import fit

    config = TrainConfig(
        data_dir=data_dir,
        run_dir=run_dir,
        topology="vgg16",
        width=0.25,
        stem="small",
        size=32,
        epochs=1,
        max_steps=20,
        batch_size=1,
        split="patient",
        keep_checkpoints=0,
    )
    result = fit(config, engines=engines)
    return {"ranks": result.ranks, "history": result.history, "model": result.model}


def echo(text):
    return text


def twenty_steps(data_dir):
    """Twenty steps of a start of its own on images of its own, by hand: checksums of both, and of
    the weights.
    """
    import keras

    from chexlib.collectives import identify, join_world
    from chexlib.data.cache import ImageStore
    from chexlib.data.nih import load_radiographs
    from chexlib.data.pipeline import training_batches
    from chexlib.models.data_parallel import DataParallelTrainer

    def checksum(model):
        return f"{zlib.crc32(b''.join(v.numpy().tobytes() for v in model.trainable_variables)):08x}"

    world, radiographs = join_world(), load_radiographs(data_dir)
    keras.utils.set_random_seed(world.rank)
    layers = [
        keras.layers.Conv2D(8, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(14, "sigmoid"),
    ]
    model = keras.Sequential([keras.Input((32, 32, 1)), *layers])
    start = checksum(model)
    trainer = DataParallelTrainer(model, world)
    trainer.compile(optimizer=keras.optimizers.SGD(0.01, momentum=0.9), jit_compile=False)
    trainer.optimizer.build(model.trainable_variables)
    world.broadcast([*model.variables, *trainer.optimizer.variables])
    batches = training_batches(
        ImageStore(radiographs.table["path"], size=32, gather=world.allgather_object),
        radiographs.labels,
        global_batch=2 * world.ranks,
        seed=0,
        rank=world.rank,
        ranks=world.ranks,
        mirror=False,
    )
    fed = [zlib.crc32(pixels.numpy().tobytes()) for pixels, _, _ in batches.take(20)]
    common = checksum(model)
    trainer.fit(batches, steps_per_epoch=20, epochs=1, verbose=0, shuffle=False)
    steps = int(trainer.optimizer.iterations)
    return {
        **identify(),
        "start": start,
        "common": common,
        "fed": fed,
        "steps": steps,
        "end": checksum(model),
    }


def hang(report):
    """Rank 1 waits in a collective for rank 0, which never comes."""
    from chexlib.collectives import join_world

    world = join_world()
    report({"waiting": True})
    if world.rank == 1:
        world.allgather_object(None)
    time.sleep(600)


FAKES = {
    "sbatch": """
        cp "$1" HERE/script; output=$(sed -n 's/^#SBATCH --output=//p' "$1")
        export SLURM_NTASKS=$(sed -n 's/^#SBATCH --ntasks=//p' "$1")
        setsid bash "$1" >"$output" 2>&1 </dev/null & echo $! >HERE/4711
        echo Submitted batch job 4711""",
    # Ranks come up in any order; here rank 0 comes last.
    "srun": """
        if [ -e HERE/broken ]; then echo "srun: error: no node wants this" >&2; exit 1; fi
        while [[ $1 == -* ]]; do shift; done
        MPIEXEC -n $SLURM_NTASKS sh -c 'test $OMPI_COMM_WORLD_RANK -gt 0 || sleep 1; exec "$@"' srun "$@" """,
    "scancel": 'echo "$@" >>HERE/cancelled; kill -- -$(cat HERE/${!#}) 2>/dev/null',
    "squeue": """
        if kill -0 $(cat HERE/4711) 2>/dev/null; then echo RUNNING; exit; fi
        echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1""",
}


def write_slurm(folder):
    """Commands that do on this host what Slurm's do, with notes in `folder` of what they were
    asked.
    """
    from chexlib.mpi import find_mpi

    mpi = find_mpi()
    for name, text in FAKES.items():
        text = text.replace("HERE", str(folder)).replace(
            "MPIEXEC", shlex.join([mpi.command, *mpi.flags()])
        )
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


if __name__ == "__main__":
    import hosts_job  # as the engines know it

    hosts_job.main(**json.loads(sys.argv[1]))
