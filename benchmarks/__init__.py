"""Measurements that run both sides alternately in one process, and their results: `python -m benchmarks.NAME`."""
