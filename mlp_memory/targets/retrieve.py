"""The retrieve stage: every row's neighbours, turned into its sparse target."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mlp_memory.arrays import ArrayReader, ChunkWriter, written_chunks
from mlp_memory.artifacts import (
    ArraySpec,
    Directory,
    UserError,
    begin,
    canonical_json,
    config_dict,
    digest,
    peek,
)
from mlp_memory.index.exact import Rows, exact_search
from mlp_memory.index.shards import single_rows
from mlp_memory.parallel.config import FleetConfig
from mlp_memory.parallel.fleet import run_units
from mlp_memory.targets.asked import Asked
from mlp_memory.targets.candidates import CandidateLists
from mlp_memory.targets.certificate import (
    NAME,
    certificate_table,
    certify_search,
    certify_store,
    check_goal,
    complete,
    draw_sample,
)
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.exclusion import Exclusion, candidates
from mlp_memory.targets.overlap import audit, audit_warnings
from mlp_memory.targets.temperature import choose_temperature, median_spread
from mlp_memory.targets.units import (
    UNITS,
    Inputs,
    Merge,
    NextTokens,
    Search,
    Stream,
    Unit,
    Worker,
    spilled_bytes,
)
from mlp_memory.training.progress import Progress


class Validation(NamedTuple):
    """Held-out positions that decide the temperature; any plain tuple of the three serves.

    Attributes:
      keys_QxD: float, their keys.
      base_log_prob_Q: the decoder's log probability of the next token, nats.
      next_token_Q: int, the token that does follow.
    """

    keys_QxD: np.ndarray
    base_log_prob_Q: np.ndarray
    next_token_Q: np.ndarray


class Temperature(NamedTuple):
    """τ, and how it came about, of targets that were made before."""

    tau: float
    choice: Mapping[str, Any]


class Truth(NamedTuple):
    """What the teacher is held against.

    Attributes:
      splits: held-out streams by name, looked for in the train stream.
      states: [N, D] the hidden states as the decoder gives them, where keys are less than that.
      mesh: devices that exact search runs on; the first one if None.
    """

    splits: Mapping[str, Stream]
    states: Rows | None = None
    mesh: Mesh | None = None


def retrieve(
    directory: Directory,
    open_inputs: Callable[[], Inputs],
    parents: Mapping[str, str],
    config: RetrieveConfig,
    validation: Validation | tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    fleet: FleetConfig | None = None,
    truth: Truth | None = None,
    temperature: Temperature | None = None,
    **facts: Any,
) -> None:
    """Writes WORKDIR/targets; goes on where an earlier start stopped.

    Arrays, row i of the stream each (or of `Inputs.chosen`), M = min(top_m, k):
      token_ids [N, M] uint16, uint32 where the vocabulary needs it: most probable first.
      probs [N, M] float16, renormalised over the M tokens. Rounding moves a value by at most
        2^-11 of itself, or 3e-8 where it is below 6e-5; so a row's sum is 1 within 2^-11.
      kept_mass [N] float32: the share of the full distribution that the M tokens hold.
      neighbours [N] uint16: neighbours found, the row itself excluded.
      support [N] uint16: tokens with a positive probability before the cut.
    A row without a next token, or without a neighbour, is zero in all of them.

    Facts: k, temperature, temperature_choice (how, and what the others gave), recall,
    mean_kept_mass, mean_support, rows_with_fewer_neighbours, certificate (digest of
    certificate.json, see `certificate`).

    A sample of rows is searched exactly first: a teacher below the goal is refused before the
    search of all rows, and the certificate is written with the targets.

    An index of several shards is searched in rounds: every shard in turn for so many blocks
    that their candidates fit `config.spill_gigabytes`, then the blocks merged. Each shard is so
    loaded once a round, and by one process or by many (`fleet`) the bytes are the same. Memory of
    a process: see `units.Worker`; here also the search of the validation sample.

    Args:
      directory: WORKDIR/targets.
      open_inputs: opens what is read. It runs once here and once in each process of a fleet,
        for which it must be picklable.
      parents: fingerprints for the manifest.
      config: what to make.
      validation: decides the temperature where that is "auto"; keys in the search space.
      fleet: who does the work; this process if None.
      truth: what the teacher is held against besides exact search over the keys.
      temperature: taken instead of the config's.
      facts: for the manifest, beside those above.

    Raises:
      UserError: temperature is "auto" and there is no validation sample; the folder holds
        targets made otherwise; keys and stream differ in length; the search finds too little.
    """
    fleet, truth = fleet or FleetConfig(), truth or Truth({})
    inputs = open_inputs()
    stream, rows = inputs.stream, len(inputs.stream)
    if inputs.keys.shape[0] != rows:
        raise UserError(
            f"the datastore has {inputs.keys.shape[0]} rows, the token stream {rows}: run embed again"
        )
    asked = inputs.asked
    unknown = config.temperature == "auto" and temperature is None
    if unknown and (validation is None or not len(validation[2])):
        raise UserError(
            'retrieve.temperature = "auto" needs a validation split and there is none: give a number'
        )
    begun = functools.partial(
        begin,
        directory,
        "targets",
        config_dict(config),
        parents,
        _arrays(len(asked), stream.vocab_size, config),
    )
    if peek(directory) is not None and begun().finished:
        return
    tau, choice = temperature or _temperature(inputs, config, validation)
    count = candidates(config, stream)
    certificate = _certify(inputs, truth, config, tau, choice, count)
    check_goal(certificate, config)  # before anything is there that another index would not fit
    manifest = begun()
    shards, recall = inputs.index.shards, inputs.index.facts.get("recall")
    writer = ChunkWriter(directory, manifest)  # makes the arrays, which workers then find
    if fleet.in_process:
        worker = Worker(directory, inputs, config, tau, count)
        work = _Work(directory, writer, asked, len(stream), config, count, shards, lambda: worker, fleet)
    else:
        make = functools.partial(_make_worker, directory.location, open_inputs, config, tau, count)
        work = _Work(directory, writer, asked, len(stream), config, count, shards, make, fleet)
        del inputs  # a shard and the keys' cache: workers have their own
    work.run()
    found = audit(stream, truth.splits, config.audit_ngram) if config.audit_ngram else None
    certificate = complete(certificate, _written(directory, asked, config.chunk_rows), found)
    data = canonical_json(certificate).encode()
    directory.write(NAME, data)
    ChunkWriter(directory, manifest).finish(
        k=config.k,
        temperature=tau,
        temperature_choice=choice,
        recall=recall,
        mean_kept_mass=certificate["kept_mass"]["mean"],
        mean_support=_mean_support(directory, asked, config.chunk_rows),
        rows_with_fewer_neighbours=certificate["rows"]["fewer_than_k"],
        certificate=digest(data),
        **facts,
    )
    for line in audit_warnings(found) if found else []:
        print(line, file=sys.stderr)
    print(certificate_table(certificate), end="", file=sys.stderr)


def _certify(
    inputs: Inputs,
    truth: Truth,
    config: RetrieveConfig,
    tau: float,
    choice: Mapping[str, Any],
    count: int,
) -> dict[str, Any]:
    """The certificate of the search, and of the store where that keeps less than hidden states."""
    stream, index, rows = inputs.stream, inputs.index, len(inputs.stream)
    place_Q, sample_Q = _sample(inputs, config)
    valid_N = stream.has_next(0, rows)
    exclusion, next_tokens = Exclusion(config, stream), NextTokens(stream)

    def lists(found: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return exclusion.exclude(*found, sample_Q)

    asked = inputs.asked
    queries_QxE = np.concatenate([asked.queries(place, place + 1) for place in place_Q.tolist()])
    found = lists(index.search(queries_QxE, count))
    exact = lists(exact_search(inputs.keys, valid_N, queries_QxE, count, truth.mesh))
    certificate = certify_search(
        found,
        exact,
        next_tokens,
        tau,
        config,
        choice=choice,
        candidates=count,
        shards=index.ranges,
        scored_rows=int(asked.asks(0, len(asked)).sum()),
        approximate_recall=index.facts.get("approximate_recall"),
    )
    if truth.states is None:
        return certificate
    states_QxD = single_rows(truth.states, sample_Q)
    whole = lists(exact_search(truth.states, valid_N, states_QxD, count, truth.mesh))
    return {**certificate, "store": certify_store(found, exact, whole, next_tokens, tau, config)}


def _sample(inputs: Inputs, config: RetrieveConfig) -> tuple[np.ndarray, np.ndarray]:
    """The certificate's sample: places in the targets and stream rows, int64 [Q] each."""
    asked = inputs.asked
    if inputs.chosen is None:
        place_Q = draw_sample(inputs.stream, config)
        place_Q = place_Q[inputs.stream.has_next(0, len(inputs.stream))[place_Q]]
        return place_Q, place_Q
    place_A = np.flatnonzero(asked.asks(0, len(asked)))
    rng = np.random.default_rng(config.certificate_seed)
    place_Q = rng.choice(place_A, min(config.certificate_rows, len(place_A)), replace=False)
    place_Q = np.sort(place_Q)
    return place_Q, asked.rows(0, len(asked))[place_Q]


def _make_worker(
    location: str, open_inputs: Callable[[], Inputs], config: RetrieveConfig, tau: float, count: int
) -> Worker:
    return Worker(Directory(location), open_inputs(), config, tau, count)


def _arrays(rows: int, vocab_size: int, config: RetrieveConfig) -> dict[str, ArraySpec]:
    top_m = min(config.top_m, config.k)
    return {
        "token_ids": ArraySpec.in_blocks((rows, top_m), _token_dtype(vocab_size), config.chunk_rows),
        "probs": ArraySpec.in_blocks((rows, top_m), "float16", config.chunk_rows),
        "kept_mass": ArraySpec((rows,), "float32", config.chunk_rows),
        "neighbours": ArraySpec((rows,), "uint16", config.chunk_rows),
        "support": ArraySpec((rows,), "uint16", config.chunk_rows),
    }


class _Work:
    """The units of one start: what is missing, in which order, and how much it is."""

    def __init__(
        self,
        directory: Directory,
        writer: ChunkWriter,
        asked: Asked,
        stream_rows: int,
        config: RetrieveConfig,
        count: int,
        shards: int,
        make_worker: Callable[[], Callable[[Unit], None]],
        fleet: FleetConfig,
    ):
        self._directory, self._writer, self._config, self._shards = directory, writer, config, shards
        self._make_worker, self._fleet, self._stream_rows = make_worker, fleet, stream_rows
        self._count, self._asked_rows = count, len(asked)
        self._lists = CandidateLists(directory / UNITS, stream_rows)
        self._row_bytes = sum(
            spec.chunk_bytes(0) // spec.chunk_shape[0] for spec in writer.manifest.arrays.values()
        )

    def run(self) -> None:
        """Does every missing unit."""
        missing = self._writer.missing()
        finished = set(range(len(self._writer))) - set(missing)
        done = sum(map(self._rows, finished))
        spills = self._shards > 1
        if spills:
            for block in finished:
                self._lists.delete(block)  # a kill came before they were deleted
            there = {block: self._lists.shards(block) for block in missing}
            done += sum(self._share(Search(s, block)) for block in missing for s in there[block])
        with Progress("retrieve", self._asked_rows, "rows", done) as progress:
            for blocks in self._rounds(missing) if spills else [missing]:
                if spills:
                    searches = [
                        [Search(s, block) for block in blocks if s not in there[block]]
                        for s in range(self._shards)
                    ]
                    self._run(progress, searches, functools.partial(self._searched, blocks))
                self._run(progress, [[Merge(block) for block in blocks]], self._merged)
                if spills:
                    for block in blocks:
                        self._lists.delete(block)

    def _rounds(self, missing: list[int]) -> Iterator[list[int]]:
        """Consecutive blocks whose candidates fit the disk space allowed; one block at least."""
        block_bytes = self._shards * spilled_bytes(self._writer.chunk_rows, self._stream_rows, self._count)
        size = max(int(self._config.spill_gigabytes * 1e9) // block_bytes, 1)
        return (missing[first : first + size] for first in range(0, len(missing), size))

    def _run(self, progress: Progress, groups: list[list[Unit]], finished: Callable[[], set[Unit]]) -> None:
        def count(unit: Unit) -> None:
            progress.advance(self._share(unit), written=self._bytes(unit))

        notes = self._directory / f"{UNITS}/failures"
        run_units("retrieve", self._make_worker, groups, self._fleet, finished, count, progress.note, notes)

    def _searched(self, blocks: list[int]) -> set[Unit]:
        return {Search(shard, block) for block in blocks for shard in self._lists.shards(block)}

    def _merged(self) -> set[Unit]:
        return {Merge(block) for block in written_chunks(self._directory)}

    def _rows(self, block: int) -> int:
        start, stop = self._writer.rows(block)
        return stop - start

    def _share(self, unit: Unit) -> int:
        """Rows that the unit counts for: a block's rows in all, and nearly all the work is search."""
        rows = self._rows(unit.block)
        if self._shards == 1:
            return rows
        if isinstance(unit, Merge):
            return 0
        return rows * (unit.shard + 1) // self._shards - rows * unit.shard // self._shards

    def _bytes(self, unit: Unit) -> int:
        rows = self._rows(unit.block)
        if isinstance(unit, Merge):
            return rows * self._row_bytes
        return spilled_bytes(rows, self._stream_rows, self._count)


def _token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _temperature(inputs: Inputs, config: RetrieveConfig, validation: Any) -> tuple[float, dict[str, Any]]:
    """τ, and how it came about; the same at every start, so that a resumed run agrees."""
    if config.temperature != "auto":
        return float(config.temperature), {"how": "given"}
    keys_QxD, base_log_prob_Q, next_token_Q = (np.asarray(part) for part in validation)
    # Spread over the whole split: neighbouring positions say much the same.
    count = min(config.validation_rows, len(next_token_Q))
    sample = np.arange(count) * len(next_token_Q) // count
    rows_Qxk, sqdist_Qxk = inputs.index.search(np.asarray(keys_QxD[sample], np.float32), config.k)
    spread = median_spread(sqdist_Qxk)
    best = choose_temperature(
        sqdist_Qxk,
        NextTokens(inputs.stream)[rows_Qxk],
        base_log_prob_Q[sample],
        next_token_Q[sample],
        [multiple * spread for multiple in config.temperatures],
    )
    how = f"least validation loss of the interpolation over {count} rows"
    return best.tau, {"how": how, "lambda": best.lam, "median_spread": spread, **best.table}


def _written(directory: Directory, asked: Asked, block_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """kept_mass and neighbours of the rows that ask, read back block by block."""
    kept_mass, neighbours = (ArrayReader(directory, name) for name in ("kept_mass", "neighbours"))
    for start in range(0, len(asked), block_rows):
        stop = min(start + block_rows, len(asked))
        asks_B = asked.asks(start, stop)
        yield kept_mass[start:stop][asks_B], neighbours[start:stop][asks_B]


def _mean_support(directory: Directory, asked: Asked, block_rows: int) -> float:
    """Mean number of tokens with a positive probability; rows that do not ask have none."""
    support, total, asking = ArrayReader(directory, "support"), 0, 0
    for start in range(0, len(asked), block_rows):
        stop = min(start + block_rows, len(asked))
        total += int(support[start:stop].sum(dtype=np.int64))
        asking += int(asked.asks(start, stop).sum())
    return round(total / max(asking, 1), 3)
