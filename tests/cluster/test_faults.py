"""The fault trials of tests/faults.py in a shorter form: `make faults` runs 20 of them."""

import pytest
from fault_notebook import prepare
from faults import KINDS, Trial, kinds_of

pytestmark = pytest.mark.cores


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    home = tmp_path_factory.mktemp("faults")
    config, weights = prepare(home)
    return {"home": home, "config": config, "weights": weights}


def test_20_trials_have_each_kind_and_a_seed_draws_the_same_again():
    kinds = kinds_of(0, 20, list(KINDS))
    assert len(kinds) == 20 and set(kinds) == set(KINDS)
    assert kinds == kinds_of(0, 20, list(KINDS)) != kinds_of(1, 20, list(KINDS))


LONG = pytest.mark.long  # a trial takes a minute of processor


@pytest.mark.parametrize(
    ("number", "kind", "restarts"),
    [
        pytest.param(2, "rank stalled", 1, marks=LONG),
        pytest.param(3, "everything killed", 0, marks=LONG),
        (4, "checkpoint flipped", 0),  # kills a rank too
    ],
)
def test_a_fault_ends_in_a_clear_error_or_in_the_same_weights_and_leaves_nothing(
    undisturbed, number, kind, restarts
):
    trial = Trial(number, kind, seed=0, restarts=restarts, **undisturbed)
    trial.play()
    print(trial.line())
    assert "equal weights" in trial.outcome and (trial.to_report is None) == (
        kind == "everything killed"
    )
