"""MLP Memory in JAX: a language model with a pretrained, retrieval-distilled memory.

The data's way is the folder order: corpus -> decoder -> datastore -> index -> targets ->
memory -> joint -> inference -> evaluation -> interchange. `python -m mlp_memory --help`.
"""

__version__ = "0.1.0"
