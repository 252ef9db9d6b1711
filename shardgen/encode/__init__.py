"""One planned shard to one written shard.

config      models and number formats, and who runs the shards ([encode], [executor])
device      whether the GPUs that are asked for are there
unit        the unit of work as values: what goes to a worker, what comes back
executors   who runs units: processes here, or a Ray cluster
lookahead   ... and tells each worker here what comes next
worker      what a worker runs
shard       windows to latents, prompts to text, the members of each sample
decoding    clips to frames, ahead of the encoder and on into the next shard
encoders    both models, one on the device at a time; text is the second of them
speed       how fast that was, and what held it up
write       the shard's files, byte for byte
"""
