"""Decoder and memory together: the mixture, and the decoder trained under it.

Reads a decoder and a memory, publishes a decoder that was trained on the interpolated
likelihood with the memory's weights frozen; inference and evaluation use both.
"""
