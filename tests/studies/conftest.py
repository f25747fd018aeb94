import json
from pathlib import Path

import numpy as np
import pytest

# As small as a study can be that still takes every stage.
RECIPE = """
corpus.source = "jsonl"
corpus.train_files = ["{text}"]
corpus.validation_fraction = 0.2
corpus.test_fraction = 0.3
corpus.vocab_size = 300
decoder.layers = 1
decoder.dim = 32
decoder.heads = 2
pretrain.steps = 12
pretrain.batch_size = 4
pretrain.context = 32
pretrain.eval_every = 12
pretrain.eval_rows = 512
pretrain.warmup = 2
embed.context = 32
embed.stride = 16
index.backend = "exact"
retrieve.k = 8
retrieve.top_m = 8
retrieve.temperatures = (0.5, 1.0)
memory.layers = 1
distill.steps = 12
distill.batch_size = 8
distill.eval_every = 4
distill.eval_rows = 512
distill.warmup = 2
evaluate.max_rows = 600
evaluate.bootstrap = 50
study.sizes = ((1, 16),)
study.rate_exponent = 0.0
study.memory_share = 0.35
study.epochs = 1.0
study.checks = 2
study.train_rows = 500
study.alphas = (0.0, 1.0)
study.ks = (2, 8)
study.teachers = ((1, 16),)
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A gin file over documents of random words."""
    folder: Path = tmp_path_factory.mktemp("recipe")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 7))) for _ in range(120)]
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(60):
            text = " ".join(rng.choice(words, 50))
            file.write(json.dumps({"text": f"{text}."}) + "\n")
    (folder / "tiny.gin").write_text(RECIPE.format(text=folder / "train.jsonl"))
    return str(folder / "tiny.gin")
