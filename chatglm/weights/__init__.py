"""The tensors of a checkpoint: read when asked for, changed by pure functions, written in shards."""
