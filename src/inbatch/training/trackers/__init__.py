"""Experiment trackers: TensorBoard in the process of the run, others as processes that follow its `metrics.jsonl`."""
