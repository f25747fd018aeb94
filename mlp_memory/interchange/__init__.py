"""Models as files that others can read: arrays and a config in, a folder of safetensors out, and back.

It knows names, shapes and dtypes of tensors and no model class; the export stage hands it
a model's arrays and takes them back for the check. It is the only importer of safetensors.
"""

from mlp_memory.interchange.model_folder import load_model, save_model

__all__ = ["load_model", "save_model"]
