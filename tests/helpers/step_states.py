"""Comparison of the states after training steps."""

import numpy as np

N = 16


def assert_same(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=tolerance, err_msg=key)
