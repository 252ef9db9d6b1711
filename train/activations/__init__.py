"""What the backward pass finds saved, recomputed or offloaded.

sizes      what a block takes
budget     how many bytes there are
plan       which outputs fit into them: pure arithmetic
runner     blocks run by that plan, under torch.utils.checkpoint
offload    inputs of blocks in the host's memory
"""
