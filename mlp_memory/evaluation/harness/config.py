"""What is benchmarked, and how λ is chosen."""

import dataclasses

from mlp_memory.artifacts import UserError, runtime
from mlp_memory.evaluation.harness.names import SYSTEMS, TASKS
from mlp_memory.settings import check_choice, check_number, check_whole, nearest

SCORINGS = ("task", "likelihood", "likelihood_per_byte", "likelihood_per_token", "pmi")
"""How the likeliest choice is found; "task" leaves it to each task's own definition."""


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Tasks, systems, and the choice of λ.

    Attributes:
      data: folder of the tasks' files (docs/guide.md lists them).
      tasks: names of local tasks.
      lm_eval_tasks: names of lm-eval's own tasks, their data on this machine.
      lm_eval_include: folder of further lm-eval task files (YAML); "" for none.
      systems: what is compared; the first is what the others' gains are over.
      limit: most examples reported for a task; 0 for all.
      validation_limit: most examples that λ is chosen on; 0 for all.
      validation_fraction: of a task's examples, where it has no file of its own for validation.
      scoring: one of `SCORINGS`. "pmi" subtracts the choice's log-likelihood after the task's domain premise;
        tasks without one keep their own definition.
      lambdas: tried for tasks that score choices; one pass of the models serves all.
      generation_lambdas: tried for tasks that generate, beside 0; each costs a pass over the validation part.
      shots: demonstrations before a generated answer, from the validation part; TruthfulQA has its own.
      max_tokens: of a generated answer.
      context: longest window in tokens; 0 for the decoder's own limit, 2048 where it has none.
      bootstrap: resamples behind an interval.
      seed: of the resampling.
      batch_tokens: read at once.
      batch: prompts continued at once.
      chunk: requests scored and saved at a time.
    """

    data: str = runtime("")
    tasks: tuple[str, ...] = ()
    lm_eval_tasks: tuple[str, ...] = ()
    lm_eval_include: str = ""
    systems: tuple[str, ...] = ("base", "base_plus_memory")
    limit: int = 0
    validation_limit: int = 500
    validation_fraction: float = 0.3
    scoring: str = "task"
    lambdas: tuple[float, ...] = tuple(i / 20 for i in range(20))
    generation_lambdas: tuple[float, ...] = (0.1, 0.25, 0.5)
    shots: int = 5
    max_tokens: int = 32
    context: int = 0
    bootstrap: int = 1000
    seed: int = 0
    batch_tokens: int = runtime(8192)
    batch: int = runtime(32)
    chunk: int = runtime(512)

    def __post_init__(self):
        for name in ("tasks", "lm_eval_tasks", "systems"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        _check_known("tasks", "task", self.tasks, TASKS)
        _check_known("systems", "system", self.systems, SYSTEMS)
        if self.systems[:1] != ("base",):
            raise UserError(f"benchmark.systems = {self.systems!r}: begin with 'base', which gains are over")
        for name in ("data", "lm_eval_include"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"benchmark.{name} = {getattr(self, name)!r}: give a path")
        least = dict.fromkeys(("limit", "validation_limit", "shots", "context", "seed"), 0)
        check_whole(
            self, least | dict.fromkeys(("max_tokens", "bootstrap", "batch_tokens", "batch", "chunk"), 1)
        )
        check_number(self, {"validation_fraction": (0.0, 1.0)})
        check_choice(self, {"scoring": SCORINGS})
        if not self.validation_fraction:
            raise UserError("benchmark.validation_fraction = 0: λ is chosen on that part, give more")
        for name in ("lambdas", "generation_lambdas"):
            object.__setattr__(self, name, _lambdas(name, getattr(self, name)))

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.tasks or self.lm_eval_tasks)


def _names(field: str, given: object) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"benchmark.{field} = {given!r}: give a list of names")
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise UserError(f"benchmark.{field} names {twice[0]!r} twice")
    return tuple(names)


def _check_known(field: str, what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"benchmark.{field}: no {what} {name!r} ({nearest(name, known)})")


def _lambdas(field: str, given: object) -> tuple[float, ...]:
    """In rising order, 0 among them: the decoder alone is always a choice."""
    values = tuple(given) if isinstance(given, tuple | list) else None
    good = values is not None and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1 for x in values
    )
    if not good:
        raise UserError(f"benchmark.{field} = {given!r}: give numbers in [0, 1)")
    return tuple(sorted({0.0, *map(float, values)}))
