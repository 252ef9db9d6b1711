"""Where the frozen weights of blocks are while no block needs them: on the card (resident), in the
host's memory (streamed), or in shares on all cards (sharded).

plan       which blocks' weights leave the card, and what they take there
layout     the weights of a block as one flat buffer
weights    a model some of whose blocks have their weights elsewhere
ring       two slots on the card, filled one block ahead
streamed   filled from the host
sharded    filled from the shares of all ranks
"""
