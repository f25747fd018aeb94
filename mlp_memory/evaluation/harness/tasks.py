"""Every local task by name."""

from mlp_memory.evaluation.harness import answers, choices, labels
from mlp_memory.evaluation.harness.examples import Task

TASKS: dict[str, Task] = {task.name: task for task in (*labels.TASKS, *choices.TASKS, *answers.TASKS)}
