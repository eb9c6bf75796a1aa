"""Online monitors: collapse, context leak, k-NN, measures without labels, and comparison with a reference run."""
