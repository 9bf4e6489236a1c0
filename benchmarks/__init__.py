"""Measurements beside peers: `python -m benchmarks.step_time` and others."""
