"""Models in a bucket, over TensorStore's memory driver in place of gs://."""

import jax
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.interchange.export import export_model
from mlp_memory.interchange.source import load, open_source


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """gs://bucket, kept in memory."""
    context, real = ts.Context(), Directory.kvstore.fget

    def kvstore(directory: Directory) -> ts.KvStore:
        if directory.is_local:
            return real(directory)
        url = f"memory://{directory.location.removeprefix('gs://')}/"
        return ts.KvStore.open(url, context=context).result()

    monkeypatch.setattr(Directory, "kvstore", property(kvstore))
    return "gs://bucket"


def test_a_model_goes_out_to_a_bucket_and_comes_back_from_it(bucket, model_folders, mesh, tmp_path):
    for folder in model_folders.iterdir():
        wanted = open_source(str(folder))
        model = load(wanted, mesh)
        remote, local = Directory(f"{bucket}/out/{folder.name}"), Directory(tmp_path / folder.name)
        for directory in (remote, local):
            export_model(
                directory, model, {"lambda": 0.5}, wanted.files, {"eos_token_id": 1}, wanted.original
            )
        assert {name: remote.read(name) for name in remote.names()} == {
            name: local.read(name) for name in local.names()
        }
        source = open_source(remote.location)
        assert (source.kind, source.config, source.files) == (wanted.kind, wanted.config, wanted.files)
        assert source.identity == open_source(local.location).identity
        jax.tree.map(np.testing.assert_array_equal, nnx.state(load(source, mesh)), nnx.state(model))


def test_what_is_wrong_in_a_bucket_is_one_line_with_its_url(bucket, model_folders, mesh):
    with pytest.raises(UserError, match=r"gs://bucket/nowhere/config\.json is missing"):
        open_source(f"{bucket}/nowhere")
    remote = Directory(f"{bucket}/cut")
    for name in ("config.json", "model.safetensors", "mlp_memory.json"):
        data = (model_folders / "llama" / name).read_bytes()
        remote.write(name, data[:-1] if name == "model.safetensors" else data)
    with pytest.raises(UserError, match=r"gs://bucket/cut/model\.safetensors is truncated") as caught:
        open_source(remote.location)
    assert "\n" not in str(caught.value)
