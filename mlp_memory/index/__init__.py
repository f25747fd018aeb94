"""Keys in, nearest rows out: ScaNN shards for speed, exact search in JAX for truth.

`stage.build_index` publishes WORKDIR/index and measures its recall against exact search;
targets/ and evaluation/ ask `search.open_index` or `exact.exact_search` for the nearest
rows of queries. Only `scann_shard` imports scann; rows without a next token are never found.
"""
