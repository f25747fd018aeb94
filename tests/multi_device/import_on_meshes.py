"""A program: imports models onto meshes of this process's devices, and exports them again.

python import_on_meshes.py SOURCES OUTPUT MESH..., MESH as "data=2,fsdp=2,tensor=2". Each folder of
SOURCES becomes the artifact OUTPUT/MESH/NAME, which is restored and exported as OUTPUT/MESH/NAME-out.
"""

import sys
from pathlib import Path

import jax
from flax import nnx
from train_on_meshes import mesh_of

from mlp_memory.artifacts import Directory, begin
from mlp_memory.decoder.pretrain import load_decoder
from mlp_memory.interchange.export import export_model
from mlp_memory.interchange.importing import import_model
from mlp_memory.interchange.source import load, open_source
from mlp_memory.memory.distill import load_memory
from mlp_memory.parallel.config import HostsConfig
from mlp_memory.parallel.hosts import joined
from mlp_memory.parallel.sharding import RULES


def assert_sharded(model: nnx.Module, mesh: jax.sharding.Mesh) -> None:
    """Every parameter lies on the mesh as the rules say, each device with its part alone."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, axes = variable.get_value(), variable.get_metadata()["logical_axes"]
        pieces = [mesh.shape[RULES[axis]] if RULES[axis] else 1 for axis in axes]
        wanted = tuple(size // piece for size, piece in zip(value.shape, pieces))
        for shard in value.addressable_shards:
            assert shard.data.shape == wanted, (path, shard.data.shape, wanted)


def main() -> None:
    sources, output = Path(sys.argv[1]), Path(sys.argv[2])
    with joined(HostsConfig()) as hosts:
        hosts.start_jax()
        for text in sys.argv[3:]:
            mesh = mesh_of(text)
            for folder in sorted(sources.iterdir()):
                source, directory = open_source(str(folder)), Directory(output / text / folder.name)
                assert_sharded(load(source, mesh), mesh)
                manifest = begin(directory, source.kind, {}, {})
                import_model(directory, manifest, source, mesh, "auto", directory / "tokenizer")
                if source.kind == "memory":
                    model, manifest = load_memory(directory, mesh)
                else:
                    model, manifest = load_decoder(directory, "import", mesh)
                assert_sharded(model, mesh)
                export_model(
                    Directory(f"{directory}-out"),
                    model,
                    {"fingerprint": manifest.fingerprint},
                    source.files,
                    {},
                    manifest.facts["original"],
                )


if __name__ == "__main__":
    main()
