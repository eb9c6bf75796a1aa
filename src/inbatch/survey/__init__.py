"""What a data set holds, and whether it can be learned from, before anything is."""
