"""From a recipe to a trained encoder: the recipe, the parts of a run, the step, the loop, checkpoints and logs."""
