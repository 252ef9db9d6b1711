"""OFFLINE: labels and footage in, shards out."""
