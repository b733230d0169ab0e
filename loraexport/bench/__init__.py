"""`loraexport bench`: workloads in YAML -> times of every contestant on the same inputs.

workloads/        the YAML, strictly; random bases and PEFT adapters for a workload, and its spec
device.py         the device: its stream, its caches, what it could do at best
contest.py        what a contestant is; whether all agree; a cell of the tables
contestants/      those of layers, models and generation
engine/           the runtime's engine under load
timing.py         alternating rounds -> median and quartiles
results.py        what bench.json holds
report/           bench.md and the PNG files, made of it
run.py            all of it, in order
"""
