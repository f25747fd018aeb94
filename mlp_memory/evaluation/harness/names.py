"""Names that a config may use: checked before anything is loaded."""

from typing import NamedTuple


class System(NamedTuple):
    """What is compared.

    Attributes:
      label: for people.
      decoder: "base" or "joint".
      partner: what it is mixed with: "memory", a search of the datastore, or None.
      gated: whether a gate gives each token's λ.
    """

    label: str
    decoder: str
    partner: str | None
    gated: bool = False


SYSTEM = {
    "base": System("base", "base", None),
    "base_plus_memory": System("base + memory", "base", "memory"),
    "base_plus_memory_gated": System("base + memory, gated", "base", "memory", True),
    "joint": System("joint", "joint", "memory"),
    "joint_gated": System("joint, gated", "joint", "memory", True),
    "knn_lm_exact": System("kNN-LM (exact)", "base", "knn_lm_exact"),
    "knn_lm_scann": System("kNN-LM (ScaNN)", "base", "knn_lm_scann"),
}
SYSTEMS = tuple(SYSTEM)

LABELS = ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agnews", "yahoo")
CHOICES = (
    "halueval_qa",
    "halueval_qa_judge",
    "halueval_dialogue",
    "halueval_summarization",
    "halueval_general",
    "truthfulqa_mc",
    "factor_news",
    "factor_wiki",
    "factor_expert",
    "strategyqa",
)
ANSWERS = ("nq_open", "webquestions", "triviaqa", "hotpotqa", "truthfulqa_generation")
TASKS = (*LABELS, *CHOICES, *ANSWERS)
