"""Which rows an update makes teachers for and trains on: the changed ones and some of the others."""

import dataclasses
import io

import numpy as np

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.index.exact import Rows
from mlp_memory.index.search import Index
from mlp_memory.index.shards import single_rows
from mlp_memory.npz import FAULTS, read_npz
from mlp_memory.targets.asked import ChosenBlocks, Source
from mlp_memory.updating.config import UpdateConfig

NAME = "blocks.npz"
_SEED = 0x0BDA7E


@dataclasses.dataclass(frozen=True)
class Choice:
    """Blocks of consecutive rows, by why they were chosen: the first row of each, int64, ascending.

    Rows are multiples of the block's length, so that a block lies in one window where states are computed.

    Attributes:
      added_A: cover the new rows.
      deleted_B: hold rows of documents deleted by this update.
      affected_C: others, nearest to rows of either.
      replay_D: others, drawn at random.
    """

    added_A: np.ndarray
    deleted_B: np.ndarray
    affected_C: np.ndarray
    replay_D: np.ndarray

    @property
    def starts_B(self) -> np.ndarray:
        """All blocks, ascending."""
        return np.sort(np.concatenate([self.added_A, self.deleted_B, self.affected_C, self.replay_D]))

    def counts(self) -> dict[str, int]:
        """Blocks by kind."""
        return {field.name[:-2]: len(getattr(self, field.name)) for field in dataclasses.fields(self)}


def choose(
    before: Source, now: Source, index: Index, block_rows: int, config: UpdateConfig, seed: int
) -> Choice:
    """The choice, the same whenever it is made.

    Args:
      before: stream and keys of the base.
      now: those of the update; the base's rows first.
      index: over `now`.
      block_rows: rows of a block.
      config: how many.
      seed: of the random draw.
    """
    old_rows, rows = len(before.stream), len(now.stream)
    gone_N = before.stream.has_next(0, old_rows) & ~now.stream.has_next(0, old_rows)
    whole = old_rows // block_rows  # a block that crosses the border is a new one
    deleted = _blocks_of(np.flatnonzero(gone_N), block_rows, whole)
    added_A = np.arange(whole * block_rows, rows if rows > old_rows else 0, block_rows)
    changed_C = np.concatenate([np.flatnonzero(gone_N), np.arange(old_rows, rows)])
    near = _near(changed_C, ChosenBlocks(np.zeros(0, np.int64), 1, before, now), index, block_rows, config)
    alive = np.ones(whole, np.bool_)
    alive[deleted] = False
    per_block = len(changed_C) / block_rows
    near = [block for block in near if block < whole and alive[block]]
    affected = np.sort(np.array(near[: round(config.affected * per_block)], np.int64))
    alive[affected] = False
    others = np.flatnonzero(alive)
    rng = np.random.default_rng([_SEED, seed, rows])
    count = min(round(config.replay * per_block), len(others))
    replay = np.sort(rng.choice(others, count, replace=False)) if count else np.zeros(0, np.int64)
    return Choice(added_A, deleted * block_rows, affected * block_rows, replay * block_rows)


def _blocks_of(rows_R: np.ndarray, block_rows: int, whole: int) -> np.ndarray:
    blocks = np.unique(rows_R // block_rows)
    return blocks[blocks < whole]


def _near(
    changed_C: np.ndarray, asked: ChosenBlocks, index: Index, block_rows: int, config: UpdateConfig
) -> list[int]:
    """Blocks that lie next to changed rows, the most often named first, equal ones in order."""
    if not len(changed_C) or not config.affected:
        return []
    count = min(config.probe_rows, len(changed_C))
    probe_Q = changed_C[np.arange(count) * len(changed_C) // count]
    keys: list[Rows] = [asked.source(int(row)).keys for row in probe_Q]
    queries_QxE = np.concatenate([single_rows(k, np.array([row])) for k, row in zip(keys, probe_Q)])
    found_Qxk, _ = index.search(queries_QxE, config.probe_neighbours)
    blocks, hits = np.unique(found_Qxk[found_Qxk >= 0] // block_rows, return_counts=True)
    return blocks[np.lexsort((blocks, -hits))].tolist()


def keep(directory: Directory, choice: Choice) -> None:
    """Writes the choice into a folder."""
    file = io.BytesIO()
    np.savez(file, **{field.name: getattr(choice, field.name) for field in dataclasses.fields(choice)})
    directory.write(NAME, file.getvalue())


def read(directory: Directory) -> Choice | None:
    """The choice of a folder; None where there is none.

    Raises:
      UserError: it is damaged.
    """
    if (data := directory.read(NAME)) is None:
        return None
    try:
        arrays = read_npz(data)
        return Choice(**{field.name: arrays[field.name] for field in dataclasses.fields(Choice)})
    except FAULTS as error:
        again = f"delete {directory} and run `update` again"
        raise UserError(f"{directory}/{NAME} is damaged: {again}") from error
