"""Measurements that run both sides alternately in one process, and their results: `python -m
benchmarks.NAME`.

The first GPU is used if there is one (CUDA_VISIBLE_DEVICES chooses), else the CPU. A table is
printed, and benchmarks/results/DATE-NAME.json written, with hardware, versions, commit and command;
no file there is replaced.
"""
