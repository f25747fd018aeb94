"""Keys in, nearest rows out: ScaNN shards for speed, exact search in JAX for truth.

`stage.build_index` publishes WORKDIR/index and measures its recall against exact search;
targets/ and evaluation/ ask `scann_index.ScannIndex` or `exact.exact_search` for the nearest
rows of queries. Only `scann_index` imports scann; rows without a next token are never found.
"""
