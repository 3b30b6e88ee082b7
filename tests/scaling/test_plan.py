"""A plan for a cluster: what is accepted of a node, and what each of its ranks gets."""

import json

import nbformat
import pytest

from chexlib.app.execute import find_notebooks
from chexlib.app.runs import check_above_zero, check_parameters
from chexlib.cluster.slurm import deal_out
from chexlib.errors import ConfigError


@pytest.mark.parametrize("wrong", [0, -58.0, float("nan")])
def test_a_node_of_no_size_or_speed_is_refused_with_what_is_accepted(wrong):
    check_above_zero(plan_batch=32, plan_gbits=0.1)
    with pytest.raises(ConfigError, match=r"Use a number above 0\.") as error:
        check_above_zero(plan_batch=32, plan_speed=wrong)
    assert f"plan_speed={wrong!r}" in str(error.value)


@pytest.mark.parametrize("wrong", [-1e-6, float("nan")])
def test_a_latency_below_0_is_refused(wrong):
    check_parameters({"plan_latency": 0.0}, {"plan_latency": "float"})
    with pytest.raises(ConfigError, match=r"plan_latency=.*Use a number of 0 or more"):
        check_parameters({"plan_latency": wrong}, {"plan_latency": "float"})


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, (46, 2)), (2, (22, 2)), (16, (1, 2)), (24, (1, 1)), (48, (1, 0))]
)
def test_ranks_of_a_node_get_no_more_than_its_cores(ranks, expected):
    assert deal_out(48, ranks) == expected and ranks * sum(expected) <= 48


@pytest.mark.parametrize("ranks", [0, 49, 2.5])
def test_more_ranks_than_cores_or_parts_of_one_are_refused(ranks):
    with pytest.raises(ConfigError, match=f"{ranks} ranks on a node of 48 cores"):
        deal_out(48, ranks)


def begin(folder, **parameters):
    """The names of notebook 08 after its parameters, imports and set-up."""
    (path,) = find_notebooks(["08"])
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    names = {}
    exec(cells[0].source, names)
    names |= {"run_dir": str(folder / "08_scale_out"), **parameters}
    for cell in cells[1:3]:
        exec(cell.source, names)
    return names


@pytest.mark.parametrize(
    ("name", "wrong"), [("plan_gbits", 0.0), ("plan_ranks", 49), ("plan_topology", "lenet")]
)
def test_notebook_08_refuses_a_plan_that_cannot_be_before_it_measures(tmp_path, name, wrong):
    with pytest.raises(ConfigError, match=f"{wrong}.*Use "):
        begin(tmp_path, **{name: wrong})
    assert not any(tmp_path.iterdir())


def test_the_noise_scale_that_notebook_04_measured_may_have_no_upper_end(tmp_path):
    scale = {"images": 300.0, "low": 200.0, "high": None, "updates": 40}
    (folder := tmp_path / "04_train_distributed").mkdir()
    (folder / "metrics.json").write_text(json.dumps({"noise_scale": scale}))
    names = begin(tmp_path)
    told = str(names["NoiseScale"](**names["noise_of_04"]))
    assert told == "Beyond about 300 images per update (200 to no end) this training gains little."
