"""How many examples a property is tried on: few, always the same; INBATCH_EXAMPLES says how many times as many."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("INBATCH_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """`count` examples, times INBATCH_EXAMPLES."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count * TIMES, derandomize=True, deadline=None, database=None, suppress_health_check=slow
    )
