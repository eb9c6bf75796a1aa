"""Applications of the library: command line, reports, benchmarks, and tables of papers."""
