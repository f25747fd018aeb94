"""A program: compiles steps of distillation for this process's eight devices and says what they hold.

python compile_distill.py: a JSON line for each number of rows and each vocabulary.
"""

import json

import jax
import numpy as np

from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.memory.distill import batch_shapes, distill_task
from mlp_memory.memory.states import StoredStates
from mlp_memory.parallel import compiled, hlo
from mlp_memory.parallel.chips import CHIPS
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh
from mlp_memory.training.loop import lower_step

if __name__ == "__main__":
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for blocks in (4096, 8192):
        for vocabulary in (8192, 16384):
            config = DistillConfig(batch_size=blocks, block_rows=64, remat="full")
            model = MemoryConfig(layers=1, dim=16, ffn_dim=32, input_dim=16, vocab_size=vocabulary)
            states = StoredStates(jax.ShapeDtypeStruct((0, 16), np.float16))
            batch = batch_shapes(config, states, 4, vocabulary)
            lowered = lower_step(distill_task(model, config, states, mesh), config, mesh, batch)
            program = hlo.parse(lowered.compile().as_text())
            found = compiled.collectives(program, CHIPS["h100"], np.zeros((8, 1), int))
            figures = {
                "rows": blocks * 64,
                "vocabulary": vocabulary,
                "largest": max(shape.elements for shape, _ in compiled.largest_buffers(program)),
                "collectives": sum(c.times * c.elements for c in found),
            }
            print(json.dumps(figures))
