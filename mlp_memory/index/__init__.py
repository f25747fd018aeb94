"""Keys in, nearest rows out: ScaNN shards for speed, exact search in JAX for truth.

`stage.build_index` publishes WORKDIR/index, its tree, codes and search chosen by measured recall;
targets/ and evaluation/ open it by `search.open_index` and ask it, or `exact.exact_search`, for the
nearest rows of queries. Only `scann_shard` imports scann; rows without a next token are never found.
"""
