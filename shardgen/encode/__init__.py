"""One planned shard to one written shard."""
