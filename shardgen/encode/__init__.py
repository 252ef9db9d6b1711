"""One planned shard to one written shard.

config      models and number formats, and who runs the shards ([encode], [executor])
device      whether the GPUs that are asked for are there
unit        the unit of work as values: what goes to a worker, what comes back
executors   who runs units: processes here, or a Ray cluster
worker      what a worker runs
shard       clips decoded ahead, both encoders, the members of each sample
encoders    both models, one on the device at a time; text is the second of them
write       the shard's files, byte for byte
"""
