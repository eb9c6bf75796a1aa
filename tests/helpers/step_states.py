"""Comparison of the states after training steps."""

import numpy as np

N = 16


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        # Relative, too: statistics of some methods have five digits, where float64 has no place for 1e-12.
        np.testing.assert_allclose(actual[key], expected[key], rtol=tolerance, atol=tolerance, err_msg=key)
