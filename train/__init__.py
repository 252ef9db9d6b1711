"""ONE trainer: torchrun train/main.py CONFIG.toml. What moves it stands in sub-packages, each with
a map of its own.

main            the loop, on one page
setup           a configuration becomes the parts of a run, the only place where our step is built
run             those parts together: resume, save, look for what went wrong
config          the whole configuration of a run; each part owns its table
base choices    what the base model decides; what each shape does: micro-batch, attention kernel
step            one micro-batch: inputs, loss, backward pass, CUDA graphs
flow            timesteps, noising, target and loss, as pure functions
optim average   one flat vector of parameters, AdamW, learning rate, clipping; its moving average
checkpoint      written whole or not at all, resumed exactly
evaluation      validation and samples, at the steps that are due
validator       validation in a run: its windows, the base's losses, the reference
validate        the losses of fixed windows at fixed noise levels
early_stop      which validation was the best, and when to stop
open_sampler    the sampler of a run, from its configuration
sampling        clips of a few captions, beside what the base makes of them
subjects        whose captions are sampled
windows         which samples of a split are looked at again and again
denoise         noise to latent, latent to frames
contact_sheet   clips as one picture; clip_gif: a clip as TensorBoard plays it
signals watch   what stops a run: somebody, or a process that can't go on
status          the end of a run, for whoever was not there
diagnose        where the first NaN comes from
records         the files of a run as types, torch-free
reports tally   steps on their way to the log; sums between two records, on the device
progress        what a run tells while it trains; tracking: to Weights & Biases
stopwatch cards where a step's time goes; what the GPU is doing, by NVML
"""
