"""Benchmarks: what the memory is worth on tasks, through EleutherAI's lm-eval.

Reads a workdir's models and benchmark files on disk, writes WORKDIR/benchmarks; `python -m mlp_memory
benchmark` calls it. Only `adapter` imports lm_eval, an optional extra.
"""
