"""The simulation behind docs/scaling.md, and the table that comes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benchmarks/spread.py"


@pytest.fixture(scope="module")
def spread(script):
    return script("benchmarks/spread.py")


def test_the_table_is_that_of_the_benchmark(spread):
    page = (ROOT / "docs/scaling.md").read_text()
    shown = page.partition("<!-- costs -->\n")[2].partition("\n<!-- /costs -->")[0]
    assert shown == spread.table(json.loads(FILE.with_suffix(".json").read_text())["costs"])


def test_the_simulation_agrees_with_a_run_of_two_workers(spread):
    found = json.loads(FILE.with_suffix(".json").read_text())["measured"]
    assert abs(found["simulated of measured"] - 1) < 0.15
    page = " ".join((ROOT / "docs/scaling.md").read_text().split())
    assert f"the simulation gives {found['simulated of measured']:.2f} of the time" in page


def test_arms_go_to_the_first_device_that_is_free(spread):
    # 5 and 3 begin; 4 comes to the second device at 3, 2 to the first at 5: both are done at 7
    assert spread.spread([5, 3, 4, 2], 2, beginning=0) == 7
    assert spread.spread([5, 3, 4, 2], 2, beginning=10) == 17
    assert spread.spread([5, 3, 4, 2], 9, beginning=0) == 5


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=40), st.integers(1, 64))
def test_a_spread_lies_between_its_bounds(spread, seconds, devices):
    """Graham 1966: a list schedule takes no longer than the mean load and the longest job together."""
    found = spread.spread(seconds, devices, beginning=0)
    assert max(max(seconds), sum(seconds) / devices) * (1 - 1e-9) <= found
    assert found <= (sum(seconds) / devices + max(seconds)) * (1 + 1e-9)


def test_deaths_and_slow_devices_cost_time_and_no_arm_is_lost(spread):
    def mean(**terms):
        draws = map(np.random.default_rng, range(200))
        return np.mean([spread.spread([3600.0] * 16, 4, draw=draw, **terms) for draw in draws])

    undisturbed = mean()
    assert undisturbed == 4 * 3600 + spread.BEGINNING
    # a death costs what was not yet in a checkpoint, two minutes at most, and a new beginning
    assert undisturbed < mean(deaths=1.0) < undisturbed + 16 * (spread.LOST + spread.BEGINNING)
    assert undisturbed < mean(slow=0.5) <= undisturbed * spread.SLOWED
