"""Meshes, the one table from logical axes to mesh axes, multi-host start, and fleets.

Models name the axes of their parameters ("embed", "mlp", "vocab"); a mesh and the table
here turn the names into shardings. Used by every stage that touches a device. A fleet does the
units of embed and retrieve, here or by Apache Beam elsewhere.
"""
