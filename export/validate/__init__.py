"""``validate``: a pruned directory measured against its original, part by part."""
