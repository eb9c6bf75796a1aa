"""Number of examples per property: small and deterministic; INBATCH_EXAMPLES multiplies it."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("INBATCH_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """Set the number of examples to half of `count`, but at least 3, times INBATCH_EXAMPLES."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
    number = max(3, count // 2) * TIMES
    return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=slow)
