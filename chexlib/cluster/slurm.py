"""Slurm scripts: the one of a training on many nodes, and the one of a notebook's engines."""

from __future__ import annotations

import math
import shlex

from chexlib import stopping
from chexlib.errors import ConfigError
from chexlib.mpi import TCP_FLAGS, thread_environment

# Filled in by ipyparallel.
ENGINES_SCRIPT = """#!/bin/bash
#SBATCH --job-name=chexlib-engines
#SBATCH --ntasks={n}
#SBATCH --cpus-per-task={threads}
#SBATCH --output={output_file}
#SBATCH --export=ALL
{options}
srun {flags} --cpus-per-task={threads} {program_and_args}
"""
_TRAINING_SCRIPT = """#!/bin/bash
# {ranks} ranks of {threads} threads on {nodes} nodes. Submit it in the project's folder: sbatch SCRIPT
#SBATCH --job-name=chexlib
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --cpus-per-task={cpus}
#SBATCH --hint=nomultithread
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --output=chexlib-%j.out
#SBATCH --signal=B:{stop}@120
set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:-$PWD}}"
{exports}
export SLURM_MPI_TYPE="${{SLURM_MPI_TYPE:-pmix}}"  # by which Open MPI's ranks find each other; Intel MPI: pmi2
# A node that fails ends the job; submit it again, and it goes on from its newest checkpoint.
srun --kill-on-bad-exit=1 --nodes={nodes} --ntasks={ranks} --ntasks-per-node={per_node} --cpus-per-task={cpus} \\
  .venv/bin/python -m chexlib train --config {config} --resume &
step=$!
trap 'kill -{stop} "$step"' {stop}  # two minutes before the limit; srun tells all ranks to keep a checkpoint and end
wait "$step" || wait "$step"
"""


def launch_script(
    config: str, *, nodes: int, per_node: int, threads: int, spare: int = 0, hours: float = 1.0
) -> str:
    """Slurm script of a training by `chexlib train`, to be submitted in the project's folder.

    Nodes are its own, and a processor is a core, not one of its hardware threads. A partition or an
    account is given to sbatch: `sbatch --partition=skx SCRIPT`.

    Parameters
    ----------
    config : str
        File with the training's settings in JSON, seen from the project's folder.
    nodes, per_node, threads : int
        Nodes, ranks on each, and threads of each rank.
    spare : int
        Processors of a rank that do not compute, but drive its communication.
    hours : float
        Time limit.

    Raises
    ------
    ConfigError
        Numbers below 1 (`spare`: below 0), or no time.

    Examples
    --------
    >>> print(launch_script("train.json", nodes=256, per_node=2, threads=22, spare=2).splitlines()[3])
    #SBATCH --nodes=256
    """
    for name, value, least in (("nodes", nodes, 1), ("per_node", per_node, 1), ("spare", spare, 0)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{name}={value!r} is not accepted. Use a whole number of {least} or more."
            )
    if not 0 < hours < math.inf:
        raise ConfigError(f"hours={hours!r} is not accepted. Use a number above 0.")
    environment = thread_environment(threads)
    # A waiting rank yields, as under our mpiexec.
    environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
    environment["I_MPI_WAIT_MODE"] = "1"
    environment["OMPI_MCA_btl_tcp_flags"] = TCP_FLAGS
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    whole_hours, minutes = divmod(math.ceil(hours * 60), 60)
    return _TRAINING_SCRIPT.format(
        nodes=nodes,
        per_node=per_node,
        ranks=nodes * per_node,
        threads=threads,
        cpus=threads + spare,
        time=f"{whole_hours:02d}:{minutes:02d}:00",
        stop=stopping.SIGNAL.name.removeprefix("SIG"),
        exports="\n".join(exports),
        config=shlex.quote(config),
    )


def deal_out(cores: int, ranks: int) -> tuple[int, int]:
    """Threads of each rank of a node, and cores that it leaves to its communication: two, as the
    study did, or fewer.

    Raises
    ------
    ConfigError
        More ranks than cores, or no whole number of them.
    """
    if ranks % 1 or not 1 <= ranks <= cores:
        raise ConfigError(
            f"{ranks:g} ranks on a node of {cores:g} cores are not accepted. Use 1 to {cores:g}."
        )
    each = int(cores // ranks)
    spare = min(2, each - 1)
    return each - spare, spare
