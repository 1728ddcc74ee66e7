"""The dialect of pruned checkpoints (``config.json``), and the two files of model code that travel with them."""
