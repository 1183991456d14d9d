"""What the benchmarks share: problems, exact samples to check against, clocks, memory, and the results table."""
