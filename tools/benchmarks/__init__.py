"""The rows of ``tools/benchmark.py``, by what they are about."""
