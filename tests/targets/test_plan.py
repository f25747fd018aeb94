import numpy as np
import pytest

from mlp_memory.arrays import ChunkWriter
from mlp_memory.artifacts import Directory, UserError, begin
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.embed import key_specs
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.index.config import IndexConfig
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.plan import MEASURED, plan_retrieve, plan_table
from mlp_memory.targets.retrieve import _arrays

DECODER = DecoderConfig(layers=4, dim=192, heads=6, vocab_size=4096)


def plan(rows=721_000, embed=None, index=None, retrieve=None, decoder=DECODER):
    needs = plan_retrieve(
        rows,
        decoder,
        embed or EmbedConfig(),
        index or IndexConfig(),
        retrieve or RetrieveConfig(k=MEASURED.k),
    )
    return {need.what: need for need in needs}


@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16", "int8"])
def test_disk_of_keys_and_targets_is_what_the_arrays_take(make_stream, tmp_path, key_dtype):
    embed, retrieve = EmbedConfig(key_dtype=key_dtype, chunk_rows=100), RetrieveConfig(k=40, chunk_rows=100)
    rows = 300
    found = plan(rows, embed, retrieve=retrieve)
    arrays = {
        "keys": key_specs(embed, rows, 192),
        "targets": _arrays(rows, make_stream(rows).vocab_size, retrieve),
    }
    for name, specs in arrays.items():
        folder = Directory(tmp_path / name)
        writer = ChunkWriter(folder, begin(folder, name, {}, {}, specs))
        for chunk in writer.missing():
            writer.write(chunk, **{n: np.zeros((100, *s.shape[1:]), s.dtype) for n, s in specs.items()})
        chunks = [p for array in specs for p in (tmp_path / name / array / "c").rglob("*") if p.is_file()]
        stored = sum(p.stat().st_size - 4 for p in chunks)  # 4 bytes of crc32c
        assert found[f"disk: {name}"].total == stored


def test_work_at_the_size_that_was_measured_is_what_was_measured():
    found = plan(MEASURED.base_rows, index=IndexConfig(shards=1))
    assert found["work: index"].total == pytest.approx(MEASURED.build * MEASURED.base_rows)
    assert found["work: retrieve"].total == pytest.approx(MEASURED.search * MEASURED.base_rows)
    one, four = plan(index=IndexConfig(shards=1)), plan(index=IndexConfig(shards=4))
    # A shard of a quarter takes less than the whole, but more than a quarter of it.
    assert 1 < four["work: retrieve"].total / one["work: retrieve"].total < 4


def test_ten_times_the_rows_need_no_more_memory_for_a_shard_but_for_tokens_and_ten_times_the_disk():
    small, large = plan(10**8), plan(10**9)
    shard = [next(n.total for n in p.values() if "shards" in n.what) for p in (small, large)]
    assert shard[1] == pytest.approx(shard[0], rel=0.05)
    for what in ("disk: keys", "disk: index", "disk: targets", "memory of a worker: the stream's tokens"):
        assert large[what].total == 10 * small[what].total


def test_keys_not_kept_take_no_disk_and_are_computed_again():
    kept, none = plan(), plan(embed=EmbedConfig(store="none"))
    assert none["disk: keys"].total == 0
    assert none["work: embed"].total == 3 * kept["work: embed"].total


def test_the_table_says_what_the_needs_are():
    needs = plan_retrieve(5_000_000_000, DECODER, EmbedConfig(), IndexConfig(), RetrieveConfig())
    text = plan_table(5_000_000_000, needs, 100)
    assert "5,000,000,000 rows" in text
    assert "3.84 TB" in text  # keys: 5e9 · 192 · 4 bytes
    assert "100 workers" in text
    assert "extrapolated" in text


def test_keys_wider_than_hidden_states_are_refused():
    with pytest.raises(UserError, match="key_dim = 256 is more than the decoder's 192"):
        plan(embed=EmbedConfig(key_dim=256))
    with pytest.raises(UserError, match="--rows = 0"):
        plan(0)
