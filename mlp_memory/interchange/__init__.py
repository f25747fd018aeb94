"""Models as files that others have or can read, in and out.

`source.open_source` recognises a Hugging Face folder, a GGUF or a llama2.c file, checks it
from its headers and reads it onto the mesh; the import stage publishes it as decoder or
memory. The export stage writes folders that `transformers` and the reference release load.
"""
