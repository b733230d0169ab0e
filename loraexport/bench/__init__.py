"""`loraexport bench`: workloads in YAML -> times of every contestant on the same inputs.

workloads.py      the YAML, strictly
projects.py       a random base and PEFT adapters for a workload, and its spec
device.py         the device: its stream, its caches, what it could do at best
graphs.py         ONNX graphs over bound buffers, captured or not
contest.py        what a contestant is; whether all agree; a cell of the tables
layers.py, models.py, generation.py     the contestants of each kind of workload
timing.py         alternating rounds -> median and quartiles
results.py        what bench.json holds
report.py, plots.py     bench.md and the PNG files, made of it
run.py            all of it, in order
"""
