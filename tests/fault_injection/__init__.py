"""Every fault that a run must bear, done to it for real: python -m tests.fault_injection."""
