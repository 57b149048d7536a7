"""Benchmarks of pat_fast against Torch-Pruning, and the model zoo that the tests share."""
