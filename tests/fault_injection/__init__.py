"""Fault injection suite: inject every fault that a run must tolerate; run with python -m tests.fault_injection."""
