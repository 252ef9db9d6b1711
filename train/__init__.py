"""ONE trainer: torchrun train/main.py CONFIG.toml.

main            the loop, on one page
setup           a configuration becomes the parts of a run, the only place where our step is built
config          the whole configuration of a run; each part owns its table
validator       validation in a run: its windows, the base's losses, the reference
validate        the losses of fixed windows at fixed noise levels
early_stop      which validation was the best, and when to stop
open_sampler    the sampler of a run, from its configuration
sampling        clips of a few captions, beside what the base makes of them
subjects        whose captions are sampled
windows         which samples of a split are looked at again and again
denoise         noise to latent, latent to frames
contact_sheet   clips as one picture
checkpoint      written whole or not at all, resumed exactly
step            one micro-batch: inputs, loss, backward pass, CUDA graphs
optim           one flat vector of parameters, AdamW, learning rate, clipping
flow            timesteps, noising, target and loss, as pure functions
progress        what a run tells while it trains
records         the lines of metrics.jsonl and validation.jsonl, torch-free
stopwatch       where a step's time goes
"""
