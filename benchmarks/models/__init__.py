"""Plain PyTorch definitions of the zoo's networks; `benchmarks.zoo` is the way in."""
