"""Killed at random moments, every run resumes and ends with the same bits."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kills import kill_loop

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")


@pytest.mark.parametrize(
    "kills", [12, pytest.param(1000, marks=[pytest.mark.torture, pytest.mark.timeout(3600)])]
)
def test_killed_runs_resume_and_end_with_the_same_bits(tmp_path, kills):
    tally = kill_loop(tmp_path, kills, seed=kills)
    print(tally)
    assert tally.kills == kills and tally.runs >= 1
    assert tally.lost == 0 and tally.different == 0
