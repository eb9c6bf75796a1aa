"""Work with a collection of images after an encoder is trained: search, duplicates, outliers, selection, labels."""
