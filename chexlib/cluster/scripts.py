"""A Slurm script that trains on many nodes: what `chexlib train` needs there, and nothing of this
machine.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from chexlib import stopping
from chexlib.errors import ConfigError
from chexlib.mpi import TCP_FLAGS, thread_environment

_SCRIPT = """#!/bin/bash
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
{options}set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:-$PWD}}"
{exports}
export SLURM_MPI_TYPE="${{SLURM_MPI_TYPE:-pmix}}"  # by which Open MPI's ranks find each other; Intel MPI: pmi2
# A node that fails ends the job; submit it again, and it goes on from its newest checkpoint.
srun --kill-on-bad-exit=1 --nodes={nodes} --ntasks={ranks} --ntasks-per-node={per_node} --cpus-per-task={cpus} \\
  {python} -m chexlib train --config {config} --resume &
step=$!
trap 'kill -{stop} "$step"' {stop}  # two minutes before the limit; srun tells all ranks to keep a checkpoint and end
wait "$step" || wait "$step"
"""


def launch_script(
    config: str,
    *,
    nodes: int,
    per_node: int,
    threads: int,
    spare: int = 0,
    hours: float = 1.0,
    python: str = ".venv/bin/python",
    options: Sequence[str] = (),
) -> str:
    """The script for a training.

    Nodes are its own, and a processor is a core, not one of its hardware threads.

    Parameters
    ----------
    config : str
        File with the training's settings in JSON, seen from the folder in which the script is
        submitted.
    nodes, per_node, threads : int
        Nodes, ranks on each, and threads of each rank.
    spare : int
        Processors of a rank that do not compute, but drive its communication.
    hours : float
        Time limit.
    python : str
        Seen from there, too.
    options : sequence of str
        Further lines for #SBATCH, such as "--partition=skx".

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
    if wrong := [option for option in options if not option.startswith("-") or "\n" in option]:
        raise ConfigError(
            f"{wrong[0]!r} is no option of sbatch. Write for instance --partition=skx."
        )
    # A waiting rank yields, as under our mpiexec.
    own = {
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "I_MPI_WAIT_MODE": "1",
        "OMPI_MCA_btl_tcp_flags": TCP_FLAGS,
    }
    environment = {**thread_environment(threads), **own}
    minutes = math.ceil(hours * 60)
    return _SCRIPT.format(
        nodes=nodes,
        per_node=per_node,
        ranks=nodes * per_node,
        threads=threads,
        cpus=threads + spare,
        time=f"{minutes // 60:02d}:{minutes % 60:02d}:00",
        options="".join(f"#SBATCH {option}\n" for option in options),
        stop=stopping.SIGNAL.name.removeprefix("SIG"),
        exports="\n".join(
            f"export {name}={shlex.quote(value)}" for name, value in environment.items()
        ),
        python=shlex.quote(python),
        config=shlex.quote(config),
    )
