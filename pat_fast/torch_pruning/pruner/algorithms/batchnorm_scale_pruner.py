from .base_pruner import BasePruner

class BNScalePruner(BasePruner):
    pass
