"""Training: recipe, run components, step, loop, checkpoints and logs."""
