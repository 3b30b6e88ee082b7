"""The clusters of the 2018 study, what it published of its scaling, and our model's word on it.

Processors and fabric
    MareNostrum 4 (BSC's user guide) and Stampede2's Skylake partition (TACC's user guide): nodes of
    two Xeon Platinum 8160, 48 cores, Omni-Path 100. TDP of the processor: 150 W (ark.intel.com);
    memory, fans and switches come on top.
Peak
    The deck's own: 2682 TF on 448 nodes.
Network
    Omni-Path's data sheet: 100 Gbit/s, 12.5 GB/s each way; MPI latency about 1 us. Inside a node
    messages go through memory, at 5 GB/s for a pair of ranks and 0.5 us: a round number for this
    generation, and of no weight here.
Spread of processors
    Acun, Miller and Kale (ICS 2016): execution times of one compute kernel differ by up to 16 %
    among the processors of Edison, Cab and Stampede with Turbo Boost. A range of 16 % over some
    thousands of normal values is 2 x 3.2 deviations: 2.5 %.
Speed of a node
    ResNet-50 from the deck's run on 448 nodes: 90 epochs of ImageNet in 58 minutes. None of its
    efficiencies enters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from chexlib.scaling.model import Cluster, Fabric, Horovod, Job, Link, hardware_efficiency, project
from chexlib.scaling.workload import Workload, workload_of

IMAGENET = 1_281_167  # images of ImageNet-1K's training part
# The study's, of ResNet-50 for 90 epochs of ImageNet: 10 GFLOP an image, `workload` has 23.
FLOP_90_EPOCHS = 1.152e18
OMNI_PATH = Link(latency=1e-6, bandwidth=12.5e9)
_MEMORY = Link(latency=0.5e-6, bandwidth=5e9)
SPREAD = 0.16 / 6.4


@dataclass(frozen=True)
class Published:
    """A run of the study's tables: images of 90 epochs of ImageNet, seconds, and the peak of all
    its nodes.
    """

    system: str
    nodes: int
    minutes: float
    peak: float  # FLOP/s
    efficiency: float  # share of the peak, as printed


PEAK_RUNS = (
    Published("the study, SKX 8160", 448, 58, 2682e12, 0.1236),
    Published("Facebook, P100", 32, 60, 2658e12, 0.1203),
    Published("You et al., SKX 8160", 1024, 48, 6144e12, 0.0651),
)


def study_clusters(copying: float = 0.0) -> dict[str, Cluster]:
    """The clusters by name: nodes of 2 x Xeon Platinum 8160, joined by Omni-Path 100.

    Parameters
    ----------
    copying : float
        Seconds a byte for fusion buffer and addition, as measured here: the study says nothing of
        it.
    """
    clusters = {}
    for name in ("MareNostrum 4", "Stampede2"):
        clusters[name] = Cluster(
            name,
            cores=48,
            peak=PEAK_RUNS[0].peak / PEAK_RUNS[0].nodes,
            watts=300.0,
            fabric=Fabric(_MEMORY, OMNI_PATH, copying=copying),
            spread=SPREAD,
        )
    return clusters


def study_speed() -> float:
    """Images/s of a node, ResNet-50, from the run on 448 nodes."""
    run = PEAK_RUNS[0]
    return 90 * IMAGENET / (run.minutes * 60 * run.nodes)


def study_workload() -> Workload:
    """ResNet-50 as the study trained it: 1,000 classes, 224 px, no biases before batch norm."""
    import keras

    network = keras.applications.ResNet50(weights=None, input_shape=(224, 224, 3))
    return workload_of(network, "resnet50", biases=False)


def study_job(workload: Workload, *, batch: int = 16) -> Job:
    """Ranks and batch of the command that the deck prints: 2 ranks per node, 8,192 images on 512
    ranks.
    """
    return Job(workload, speed=study_speed(), per_node=2, batch=batch, images=IMAGENET, epochs=90)


def study_horovod(request: float) -> dict[str, Horovod]:
    """What brought gradients together on each system.

    Intel Caffe's MLSL reduces each layer's gradients as they come, with nothing to negotiate.
    Horovod of 2018 (0.13) kept no answers, had cycles of 5 ms, and the deck's fusion buffer of 128
    MiB.

    Parameters
    ----------
    request : float
        Seconds that rank 0 takes for one gradient of one rank, measured here from Horovod's
        timeline.
    """
    return {
        "MareNostrum 4": Horovod(overlap=True, cycle=0.0),
        "Stampede2": Horovod(overlap=True, cycle=5e-3, request=request),
    }


def published_scaling(alone: float) -> pd.DataFrame:
    """The deck's points: system, nodes, images_per_second, efficiency, and how that is printed.

    Parameters
    ----------
    alone : float
        Images/s of one node: for Stampede2 the deck has no efficiency over one node, only speeds.
    """
    over_one = "printed speed over our one node"
    rows = [
        ("MareNostrum 4", 256, 15_170, 0.90, "printed, over one node"),
        ("MareNostrum 4", 512, None, 0.90 * 0.85, "at least: printed over 85 % from 256"),
        ("Stampede2", 256, 16_400, 16_400 / 256 / alone, over_one),
        ("Stampede2", 512, 26_700, 26_700 / 512 / alone, f"{over_one}; 81 % from 256"),
    ]
    return pd.DataFrame(rows, columns=["system", "nodes", "images_per_second", "efficiency", "how"])


def study_claims(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The two efficiencies that the model must answer to, in percent, from `project` on each
    system.

    Returns
    -------
    DataFrame
        By claim: published, model, miss (points).
    """
    efficiency = tables["MareNostrum 4"]["efficiency"]
    speed = tables["Stampede2"]["images_per_second"]
    rows = {
        "MareNostrum 4, 1 to 256 nodes": (90.0, 100 * efficiency[256]),
        "Stampede2, 256 to 512 nodes": (
            100 * 26_700 / 2 / 16_400,
            100 * speed[512] / 2 / speed[256],
        ),
    }
    table = pd.DataFrame(rows, index=["published", "model"]).T
    return table.assign(miss=table["model"] - table["published"])


def study_sensitivity(workload: Workload, *, copying: float, request: float) -> pd.DataFrame:
    """The projection again, with what is not known of the study's clusters at other values.

    The spread of processors is halved: its source gives the largest that was seen. A request is
    halved and doubled. The images per rank are not printed for Stampede2. MareNostrum's 8,192 images
    are, and its Caffe had no requests.

    Returns
    -------
    DataFrame
        A row a combination, the first of a system the one that is projected: system, images_a_rank,
        request (seconds), spread; images_per_second, efficiency and solution_hours on 256 and 512
        nodes, such as efficiency_256; and further, the speed on 512 nodes over twice that on 256.
    """
    rows = []
    for name, usual in study_horovod(request).items():
        batches, factors = ((16, 32, 64), (1, 0.5, 2)) if usual.request else ((16,), (1,))
        for batch, factor, share in itertools.product(batches, factors, (1, 0.5)):
            cluster = replace(study_clusters(copying)[name], spread=share * SPREAD)
            horovod = replace(usual, request=factor * usual.request)
            job = study_job(workload, batch=batch)
            table = project(job, cluster, horovod=horovod, nodes=(256, 512))
            row = {
                "system": name,
                "images_a_rank": batch,
                "request": horovod.request,
                "spread": cluster.spread,
            }
            for value in ("images_per_second", "efficiency", "solution_hours"):
                for nodes in (256, 512):
                    row[f"{value}_{nodes}"] = table.loc[nodes, value]
            row["further"] = row["images_per_second_512"] / row["images_per_second_256"] / 2
            rows.append(row)
    return pd.DataFrame(rows)


def peak_shares() -> pd.DataFrame:
    """Share of the peak in percent by run: printed, by the formula, and low and high for minutes
    rounded to whole.
    """
    rows = {}
    for run in PEAK_RUNS:
        row = {"printed": 100 * run.efficiency}
        for name, off in {"formula": 0, "low": 0.5, "high": -0.5}.items():
            seconds = 60 * (run.minutes + off)
            row[name] = 100 * hardware_efficiency(1, FLOP_90_EPOCHS, seconds, run.peak)
        rows[run.system] = row
    return pd.DataFrame.from_dict(rows, orient="index")
