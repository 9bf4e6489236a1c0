"""What the examples and the benchmarks share, one subject a file."""
