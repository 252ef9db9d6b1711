"""Which process does what, and what they exchange.

mesh    the place of this process, the all-reduce of a step
"""
