"""Which process does what, and what they exchange.

sequence    one sample on several processes: tokens for heads
mesh        the place of this process, the all-reduce of a step
meeting     how the processes find each other
beats       signs of life
config      its table
"""
