"""MLP Memory in JAX: a language model with a pretrained, retrieval-distilled memory.

The data's way is the folder order: corpus -> decoder -> datastore -> index -> targets ->
memory -> joint -> inference -> evaluation -> interchange. `python -m mlp_memory --help`.

    model = mlp_memory.load("runs/demo")
    print(model.generate("Return a list of"))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlp_memory.language_model import LanguageModel

__version__ = "0.1.0"


def load(
    workdir: str, model: str = "base_plus_memory", interpolation: float | str | None = None
) -> "LanguageModel":
    """The models of a workdir as one that continues and scores texts.

    Args:
      workdir: a folder, gs:// or s3://, that `run` has filled.
      model: "base", "base_plus_memory", "joint", or kNN-LM: "knn_lm_exact", "knn_lm_scann".
      interpolation: λ, the memory's share; None for the best on validation, "gate" for a share of
        each token's own.

    Raises:
      mlp_memory.artifacts.UserError: something is missing, damaged or impossible.
    """
    from mlp_memory.artifacts import Directory
    from mlp_memory.job import Job
    from mlp_memory.language_model import language_model
    from mlp_memory.recipes import load_config

    directory = Directory(workdir)
    return language_model(Job(directory, load_config([], [], directory)), model, interpolation)
