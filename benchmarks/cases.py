"""Models of the zoo as subjects of the comparison with Torch-Pruning."""

from __future__ import annotations

from benchmarks.zoo import ZOO, randomize_
from pat_fast.bench import subject
from pat_fast.bench.subject import classifier, num_heads, quiet

__all__ = ["MODELS", "Subject", "classifier", "num_heads", "quiet"]

MODELS = ("resnet50", "densenet121", "vit_s16")


class Subject(subject.Subject):
    """A model of the zoo with random weights, its plan and Torch-Pruning's groups.

    Args:
        name: key of the zoo.
        small: take the small version.
        seed: of the weights.
    """

    def __init__(self, name: str, small: bool = False, seed: int = 0) -> None:
        entry = ZOO[name]
        model = randomize_(entry.small() if small else entry.build(), seed)
        super().__init__(name, model, entry.example(small), verify=False)
