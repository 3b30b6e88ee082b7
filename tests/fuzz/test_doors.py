"""Whatever a file holds, its door reads it or refuses it in one line: the short form of `make fuzz`."""

import logging

import pytest
from doors import DOORS, enter
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", DOORS)
def test_a_file_made_to_break_its_door_is_read_or_refused(door, tmp_path_factory):
    logging.getLogger("chexlib").setLevel(logging.CRITICAL)
    few = 8 if door == "cache" else 40
    outcomes = set()

    @settings(
        max_examples=few,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def trial(data):
        folder = tmp_path_factory.mktemp(door)
        DOORS[door][0](data.draw, folder)
        outcomes.add(enter(door, folder))

    trial()
    # Else its files are all whole, or all rubbish. What a cache lacks is decoded anew.
    assert outcomes == ({"read"} if door == "cache" else {"read", "refused"})
