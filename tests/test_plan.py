"""A plan for a reader's cluster: what is said of a node, and what each of its ranks gets."""

import pytest

from chexlib.errors import ConfigError
from chexlib.scaling.model import Horovod, Job, project
from chexlib.scaling.plan import deal_out, read_quantities

NODE = "48 cores, 5.99 TFLOP/s, 300 W, 58 images/s, 100 Gbit/s, 1 us"


def test_numbers_are_told_apart_by_their_units():
    assert read_quantities(NODE, like=NODE) == [48, 5.99, 300, 58, 100, 1]
    turned = "1 us, 1e2 Gbit/s, 58 images/s, 300 W, 5.99  TFLOP/s,48 cores"
    assert read_quantities(turned, like=NODE) == [48, 5.99, 300, 58, 100, 1]
    assert read_quantities("2 ranks a node", like="4 ranks a node") == [2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("48 cores", "2 x 24 cores"),
        ("58 images/s", "1,000 images/s"),
        ("5.99 TFLOP/s", "5990 GFLOP/s"),
        ("1 us", "1 us."),
        ("1 us", "1 us, 2 us"),
        ("300 W, ", ""),
        ("100 Gbit/s", "0 Gbit/s"),
        ("58 images/s", "-58 images/s"),
    ],
)
def test_a_node_that_cannot_be_read_is_refused_with_what_is_accepted(old, new):
    with pytest.raises(ConfigError, match=r"not accepted\. Write it like") as error:
        read_quantities(NODE.replace(old, new), like=NODE)
    assert new in str(error.value) and NODE in str(error.value)


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
