"""Neighbours in, sparse next-token distributions out: what the memory is taught.

`retrieve.retrieve` searches the index for every row of the stream, leaves the row itself
out, and writes WORKDIR/targets by `units` that many processes may do; memory/ reads them in
distillation. `knn` has the distribution itself, which evaluation/ and inference/ use for kNN-LM,
`temperature` its τ. `exclusion` says what may not be a neighbour, `certificate` how good the
teacher is, `overlap` what of the held-out text it has seen, `plan` what another size would take.
"""
