"""Tests of parts that users write: `check_method` runs on a method the tests that all methods of this package pass."""

from inbatch.testing.check import check_method
from inbatch.testing.report import Finding, MethodError, Report

__all__ = ["Finding", "MethodError", "Report", "check_method"]
