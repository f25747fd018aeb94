"""Next-token distributions of decoder and memory together, and text from them.

Reads a decoder and, if there is one, a memory; no datastore and no search.
"""
