"""Checks made during a run, and comparison with a reference run."""
