"""A page of many runs: `inbatch runs` writes one HTML file with their table, curves and differences of recipes."""
