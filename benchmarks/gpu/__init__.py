"""Measurements of one run on one GPU: `python -m benchmarks.gpu --out DIR`; see `__main__`."""
