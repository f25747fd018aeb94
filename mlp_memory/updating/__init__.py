"""Documents added to a workdir's memory and taken out of it, at a cost that grows with them alone.

An update is a workdir of its own, made by the ordinary stages out of what another one has: whatever
it has in common with that one it takes over, and each stage does the rest.
"""
