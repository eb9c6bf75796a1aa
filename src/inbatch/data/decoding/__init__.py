"""Image decoders, one file per format."""
