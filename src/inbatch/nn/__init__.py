"""Functions of tensors and small modules, independent of ranks, recipes and images."""
