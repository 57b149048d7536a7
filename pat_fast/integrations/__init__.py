"""Pruning in the trainers of others: ``pat_fast.integrations.lightning`` and ``pat_fast.integrations.transformers``."""
