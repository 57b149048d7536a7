"""What the drop-in pruners stand on: plans in Torch-Pruning's terms, its groups made from them, ranking, surgery."""
