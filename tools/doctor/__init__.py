"""python -m tools.doctor [CONFIG.toml]: can this machine do the work, and this run start?

host.py    interpreter, packages, memory, fonts
cards.py   GPUs: what they are, what runs on them, what moves between them
run.py     a configuration: dataset, model folder, room on the disk, one timed step
finding.py one line of the answer
"""
