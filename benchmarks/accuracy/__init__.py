"""Accuracy at a given cost: pat_fast and Torch-Pruning on real data, `python -m benchmarks.accuracy`."""
