"""From token stream to keys: row i of `keys` is the decoder's tapped state at row i.

Reads the corpus and the decoder; the index is built over the keys and the memory is
trained on them.
"""
