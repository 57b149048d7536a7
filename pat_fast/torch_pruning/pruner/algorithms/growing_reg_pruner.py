from .base_pruner import BasePruner

class GrowingRegPruner(BasePruner):
    pass
