"""Functions of tensors and small modules. They know no rank, no recipe and no image."""
