"""Comparison of the states after training steps."""

import numpy as np

N = 16


def assert_same(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        sizes = np.abs(expected[key])
        largest = float(sizes.max(initial=1.0, where=np.isfinite(sizes)))  # some averages start at infinity
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=tolerance * largest, err_msg=key)
