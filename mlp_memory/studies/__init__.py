"""Studies: a recipe run again and again with one thing changed, and what the paper claims of it measured.

A study is a list of variants, each an ordinary workdir made by the ordinary stages; what two of them would
make alike is made once. In goes a recipe with its `study` section, out come WORKDIR/studies/NAME/results.json
and findings.json; `python -m mlp_memory study` calls it.
"""
