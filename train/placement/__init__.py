"""Where the frozen weights of blocks are while no block needs them: on the card (resident), in the
host's memory (streamed), or in shares on all cards (sharded).
"""
