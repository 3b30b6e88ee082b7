"""A plan for a cluster: what is accepted of a node, and what each of its ranks gets."""

import pytest

from chexlib.errors import ConfigError
from chexlib.scaling.model import Cluster, Fabric, Horovod, Job, Link, deal_out, project

WIRE = Link(latency=1e-6, bandwidth=12.5e9)
NODE = {"cores": 48, "peak": 5.99e12, "watts": 300.0, "fabric": Fabric(WIRE, WIRE)}
JOB = {"speed": 58.0, "per_node": 2, "batch": 32, "images": 1000, "epochs": 1}


@pytest.mark.parametrize("wrong", [0, -58.0, float("nan")])
@pytest.mark.parametrize("name", ["cores", "peak", "watts", "bandwidth", "speed", "batch"])
def test_a_node_of_no_size_or_speed_is_refused_with_what_is_accepted(name, wrong):
    with pytest.raises(ConfigError, match=r"Use a number above 0\.") as error:
        if name == "bandwidth":
            Link(latency=1e-6, bandwidth=wrong)
        elif name in NODE:
            Cluster("yours", **{**NODE, name: wrong})
        else:
            Job(None, **{**JOB, name: wrong})
    assert f"{name}={wrong!r}" in str(error.value)


@pytest.mark.parametrize("wrong", [-1e-6, float("nan")])
def test_a_latency_below_0_is_refused(wrong):
    with pytest.raises(ConfigError, match="latency="):
        Link(latency=wrong, bandwidth=12.5e9)


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, (46, 2)), (2, (22, 2)), (16, (1, 2)), (24, (1, 1)), (48, (1, 0))]
)
def test_ranks_of_a_node_get_no_more_than_its_cores(ranks, expected):
    assert deal_out(48, ranks) == expected and ranks * sum(expected) <= 48


@pytest.mark.parametrize("ranks", [0, 49, 2.5])
def test_more_ranks_than_cores_or_parts_of_one_are_refused(ranks):
    with pytest.raises(ConfigError, match=f"{ranks} ranks on a node of 48 cores"):
        deal_out(48, ranks)


@pytest.mark.parametrize(("nodes", "per_node"), [([1, 0], 2), ([1], 0)])
def test_a_projection_to_nobody_is_refused(nodes, per_node):
    job = Job(None, speed=1.0, per_node=per_node, batch=1, images=1, epochs=1)
    with pytest.raises(ConfigError, match="at least 1 of each"):
        project(job, None, horovod=Horovod(), nodes=nodes)
