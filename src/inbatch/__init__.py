"""inbatch: learn image features by letting the samples of a batch teach each other."""
