"""Write, prove and deliver pruned checkpoints. Users import from ``prune_attn``."""
