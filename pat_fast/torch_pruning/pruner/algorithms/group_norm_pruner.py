from .base_pruner import BasePruner

class GroupNormPruner(BasePruner):
    pass
