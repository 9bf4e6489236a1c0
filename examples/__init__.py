"""Examples: `python -m examples.train_digits` and others, each on data that needs no download."""
