"""One pass over a benchmark for many weight sets, and the results per example that it leaves."""
