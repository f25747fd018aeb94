"""A program: compiles steps of training for this process's eight devices and says what they hold.

python compile_steps.py: a JSON line of distillation for each number of rows and each vocabulary, and
one of joint training with a gate and the divergence from where it started.
"""

import json

import jax
import numpy as np
from flax import nnx

from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import batch_shapes as window_shapes
from mlp_memory.joint.config import JointConfig
from mlp_memory.joint.gate import SIGNALS, Gate
from mlp_memory.joint.train import joint_task
from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.memory.distill import batch_shapes, distill_task
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.states import StoredStates
from mlp_memory.parallel import compiled, hlo
from mlp_memory.parallel.chips import CHIPS
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh
from mlp_memory.parallel.sharding import without_numbers
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
    decoder = DecoderConfig(layers=1, dim=16, heads=2, ffn_dim=32, vocab_size=8192)
    memory = MemoryConfig(layers=1, dim=16, ffn_dim=32, input_dim=16, vocab_size=8192)
    models = (
        without_numbers(lambda: Decoder(decoder, nnx.Rngs(0)), mesh),
        without_numbers(lambda: Memory(memory, nnx.Rngs(0)), mesh),
    )
    config = JointConfig(batch_size=16384, context=16, interpolation="gate", kl=0.1, remat="full")
    gate = Gate(*[np.ones(len(SIGNALS) + 16, np.float32)] * 3, np.float32(0), np.float32(1))
    task = joint_task(*models, config, Tap(), gate, mesh)
    lowered = lower_step(task, config, mesh, window_shapes(config.batch_size, config.context))
    program = hlo.parse(lowered.compile().as_text())
    largest = max(shape.elements for shape, _ in compiled.largest_buffers(program))
    print(json.dumps({"rows": 16384 * 16, "vocabulary": 8192, "largest": largest}))
