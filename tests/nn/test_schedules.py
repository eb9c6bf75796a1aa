import pytest

from inbatch.errors import ConfigError
from inbatch.nn import schedules


def test_ends_of_a_ramp():
    assert [schedules.progress(i, 4) for i in range(4)] == [0, 0.25, 0.5, 0.75]
    assert [schedules.progress(i, 4, "end") for i in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [schedules.progress(i, 5, "both") for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_phase_without_length_is_over():
    assert schedules.progress(0, 0) == schedules.progress(0, 1, "both") == 1
    assert schedules.warmup_cosine(0, 10, 0, base=0.5) == 0.5


def test_after_the_end_the_value_stays():
    assert schedules.warmup_cosine(25, 10, 2, base=1.0, end=0.125) == 0.125


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warm-up of 11 steps"):
        schedules.warmup_cosine(0, 10, 11, base=1.0)
