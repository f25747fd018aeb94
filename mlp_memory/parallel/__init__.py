"""Meshes, the one table from logical axes to mesh axes, and multi-host start.

Models name the axes of their parameters ("embed", "mlp", "vocab"); a mesh and the table
here turn the names into shardings. Used by every stage that touches a device.
"""
