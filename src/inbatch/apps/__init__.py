"""Programs on top of the library: the command line, reports, benchmarks and tables of papers."""
