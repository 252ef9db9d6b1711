"""Made-up corpora, checkpoints, datasets and runs, for tests, benchmarks and the demo.

corpus items clips stills   a corpus in the users' layout, with its traps; its media
checkpoint vae randomise    models of tiny dimensions in diffusers' layout
batch feed step             datasets of random tensors, a feed on them, a micro-batch
catalog runs                a catalog and finished runs, for what shows them
learned_clips               what the model in learned/ has seen
learned_corpus              that, and what it is to be taught, as labels and clips
"""
