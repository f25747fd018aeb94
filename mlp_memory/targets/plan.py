"""What embed, index and retrieve would need at another size: disk, memory and worker-hours, on paper.

Nothing is read but the config, and nothing is run. A worker is a process with two cores, as the
rates were measured on (docs/results.md).
"""

import dataclasses
import math

from mlp_memory.artifacts import UserError, as_dtype
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.shards import bytes_per_key, shard_count
from mlp_memory.targets.config import RetrieveConfig

_CANDIDATE_BYTES = 8
_GIBIBYTE = 1 << 30


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a worker does.

    A law in the rows n of a shard is seconds = `at_base`·(n / base_rows)^exponent, at `dim`
    dimensions and k neighbours; that it goes with d, and a search with k, is taken for granted.

    Attributes:
      flops: floating-point operations a second in embedding.
      build: seconds that a key takes to be coded and written; choosing tree and codes, some 100 s
        for an index of any size, is left out.
      build_exponent: of the time of one key.
      search: seconds that a query takes in a shard.
      search_exponent: of the time of one query.
      base_rows, dim, k: where `build` and `search` hold.
    """

    flops: float
    build: float
    build_exponent: float
    search: float
    search_exponent: float
    base_rows: int
    dim: int
    k: int


# docs/results.md, "Cost against the number of keys": search by the law fitted from 125,000 to 721,000
# rows (1.47 for all rows, 0.47 for one), coding by the difference between these sizes; a nearest
# centre is one of some √n, hence its exponent. Embedding as SmolLM2-135M and a decoder of 3 M both
# do it.
MEASURED = Rates(
    flops=6e10,
    build=6e-5,
    build_exponent=0.5,
    search=863e-6,
    search_exponent=0.47,
    base_rows=721_000,
    dim=192,
    k=1024,
)


@dataclasses.dataclass(frozen=True)
class Need:
    """One thing that is needed: how much a row, and in all; None where it does not go by row."""

    what: str
    per_row: float | None
    total: float
    unit: str


def plan_retrieve(
    rows: int,
    decoder: DecoderConfig,
    embed: EmbedConfig,
    index: IndexConfig,
    retrieve: RetrieveConfig,
    rates: Rates = MEASURED,
) -> list[Need]:
    """Disk in bytes, memory of a worker in bytes, and worker-seconds, for a datastore of N rows.

    Args:
      rows: N.
      decoder: D and the FLOPs of embedding.
      embed, index, retrieve: what is kept, sharded and asked for.
      rates: of one worker.

    Raises:
      UserError: N is not 1 or more, or keys have more dimensions than hidden states.
    """
    if rows < 1:
        raise UserError(f"--rows = {rows}: give the tokens of the datastore, 1 or more")
    dim = embed.key_dim or decoder.dim
    if dim > decoder.dim:
        raise UserError(f"embed.key_dim = {dim} is more than the decoder's {decoder.dim} dimensions")
    shards = shard_count(rows, dim, index)
    shard_rows = math.ceil(rows / shards)
    token_bytes = 2 if decoder.vocab_size <= 1 << 16 else 4
    return [
        *_disk(rows, dim, shards, token_bytes, embed, index, retrieve),
        *_memory(rows, dim, shards, shard_rows, token_bytes, retrieve),
        *_work(rows, dim, shards, shard_rows, decoder, embed, retrieve.k, rates),
    ]


def _disk(
    rows: int,
    dim: int,
    shards: int,
    token_bytes: int,
    embed: EmbedConfig,
    index: IndexConfig,
    retrieve: RetrieveConfig,
) -> list[Need]:
    keys = dim * as_dtype(embed.key_dtype).itemsize if embed.store == "array" else 0
    scann = bytes_per_key(dim, index) if index.backend == "scann" else 0
    top_m = min(retrieve.top_m, retrieve.k)
    targets = top_m * (token_bytes + 2) + 8
    per_row = {"keys": keys, "index": scann, "targets": targets}
    needs = [Need(f"disk: {name}", value, value * rows, "B") for name, value in per_row.items()]
    if shards > 1:
        spilled = min(
            retrieve.spill_gigabytes * 1e9, float(rows) * shards * (retrieve.k + 1) * _CANDIDATE_BYTES
        )
        needs.append(Need("disk: candidates, at a time", None, spilled, "B"))
    return needs


def _memory(
    rows: int, dim: int, shards: int, shard_rows: int, token_bytes: int, retrieve: RetrieveConfig
) -> list[Need]:
    shard = 1.5 * 4 * shard_rows * dim + _GIBIBYTE
    block = min(retrieve.chunk_rows, rows) * (8 * dim + 32 * (retrieve.k + 1))
    return [
        Need(f"memory of a worker: one of {shards:,} shards, built or searched", None, shard, "B"),
        Need("memory of a worker: the stream's tokens", token_bytes, token_bytes * rows, "B"),
        Need("memory of a worker: a block's queries and candidates", None, block, "B"),
    ]


def _work(
    rows: int,
    dim: int,
    shards: int,
    shard_rows: int,
    decoder: DecoderConfig,
    embed: EmbedConfig,
    k: int,
    rates: Rates,
) -> list[Need]:
    # Forward only, and no head; each row stands in context / stride windows.
    flops = decoder.train_flops(1, embed.context) / 3 - 2 * decoder.dim * decoder.vocab_size
    flops *= embed.context / embed.stride
    relative, wider = shard_rows / rates.base_rows, dim / rates.dim
    build = rates.build * relative**rates.build_exponent * wider
    search = shards * rates.search * relative**rates.search_exponent * wider * k / rates.k
    # Without stored keys they are computed to build, to search, and to certify.
    passes = 1 if embed.store == "array" else 3
    seconds = {"embed": passes * flops / rates.flops, "index": build, "retrieve": search}
    needs = [Need(f"work: {name}", value, value * rows, "s") for name, value in seconds.items()]
    total = sum(seconds.values())
    return [*needs, Need("work in all", total, total * rows, "s")]


def plan_table(rows: int, needs: list[Need], workers: int) -> str:
    """The plan for people."""
    lines = [("", "a row", "in all")]
    lines += [(need.what, _amount(need.per_row, need.unit), _total(need)) for need in needs]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    text = [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in lines]
    hours = next(need.total for need in needs if need.what == "work in all") / 3600
    return "\n".join(
        [
            f"{rows:,} rows",
            *text,
            f"{workers:,} {'worker' if workers == 1 else 'workers'} of two cores: {_hours(hours / workers)}",
            "From rates measured at most at 721,000 rows of 192 dimensions (docs/results.md); "
            "the rest is extrapolated.",
        ]
    )


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f} B" if unit == "B" else f"{1000 * value:,.3g} ms"


def _total(need: Need) -> str:
    return _bytes(need.total) if need.unit == "B" else _hours(need.total / 3600)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:,.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:,.3g} min"
    return f"{hours:,.3g} h" if hours < 1e5 else f"{hours / 8766:,.3g} years"
