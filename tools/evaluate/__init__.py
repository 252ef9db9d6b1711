"""Does this LoRA help? An answer with an error bar.

config                     the TOML of an evaluation
evaluation_set variants    which prompts, seeds and noise; what is evaluated, proven to be in effect
inputs                     model, datasets and LoRAs, checked before hours go into clips
generate                   clips of the base and of each candidate, and the real ones
clips                      the folder of an evaluation: what is in it, one mp4 decoded at a time
score                      extractors, towers, pictures: numbers and features of each clip
compare                    metrics, paired differences, plot, sheets, grade
frechet intervals votes    the maths, pure
result                     result.json: the only interface to whatever shows figures
"""
