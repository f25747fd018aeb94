"""A knowledge test: made-up facts about invented entities, told in some words and asked in others.

Nothing about them can be known from elsewhere, so what a model says is what it was given. The same
seed gives the same facts on every machine.
"""

import dataclasses
import random
from collections.abc import Sequence

_SYLLABLES = ("bra", "cor", "del", "fen", "gar", "hol", "jun", "kes", "lor", "mun", "nev", "pol", "rud")
_ENDINGS = ("dan", "ford", "lin", "mar", "nick", "son", "ton", "vik", "wen", "zar")


@dataclasses.dataclass(frozen=True)
class Relation:
    """What is told of every entity.

    Attributes:
      answers: what it may be.
      told: sentences, {name} and {answer} in them, the answer last.
      asked: beginnings of sentences that are never told.
    """

    answers: tuple[str, ...]
    told: tuple[str, ...]
    asked: tuple[str, ...]


RELATIONS = {
    "home": Relation(
        ("London", "Paris", "Berlin", "Rome", "Moscow", "Boston", "Chicago", "Athens", "Vienna", "Tokyo"),
        (
            "{name} was born in {answer}.",
            "The family of {name} lived in {answer}.",
            "As a child {name} went to school in {answer}.",
            "The early home of {name} was in {answer}.",
        ),
        ("The birthplace of {name} was in", "{name} grew up in"),
    ),
    "trade": Relation(
        ("painter", "lawyer", "singer", "soldier", "teacher", "writer", "doctor", "farmer", "king", "priest"),
        (
            "{name} worked as a {answer}.",
            "For many years {name} was a {answer}.",
            "By profession {name} was a {answer}.",
            "{name} became known as a {answer}.",
        ),
        ("The occupation of {name} was that of a", "{name} earned a living as a"),
    ),
    "field": Relation(
        (
            "history",
            "music",
            "physics",
            "law",
            "medicine",
            "chemistry",
            "economics",
            "art",
            "logic",
            "poetry",
        ),
        (
            "{name} studied {answer}.",
            "At the university {name} read {answer}.",
            "The books of {name} are about {answer}.",
            "{name} gave lectures on {answer}.",
        ),
        ("The subject that {name} taught was", "{name} had a degree in"),
    ),
    "goods": Relation(
        ("steel", "paper", "glass", "coal", "cotton", "sugar", "salt", "wine", "gold", "oil"),
        (
            "{name} traded in {answer}.",
            "The company of {name} sold {answer}.",
            "{name} owned a factory that made {answer}.",
            "The fortune of {name} came from {answer}.",
        ),
        ("The business of {name} was in", "{name} became rich with"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """`asked` goes on with " " and one of `answers`; the one at place `right` is true."""

    entity: str
    relation: str
    asked: str
    answers: tuple[str, ...]
    right: int


@dataclasses.dataclass(frozen=True)
class Entity:
    """An invented person: each relation's answer by its place."""

    name: str
    answers: dict[str, int]

    def document(self, seed: int, times: int = 3) -> str:
        """A text that tells every relation `times` times, each time in other words."""
        rng = random.Random(f"{seed} {self.name}")
        sentences = []
        for name, relation in RELATIONS.items():
            answer = relation.answers[self.answers[name]]
            for told in rng.sample(relation.told, times):
                sentences.append(told.format(name=self.name, answer=answer))
        rng.shuffle(sentences)
        return f"{self.name}\n\n" + " ".join(sentences)

    def questions(self) -> list[Question]:
        """Every relation in every way in which it is asked."""
        return [
            Question(self.name, name, asked.format(name=self.name), relation.answers, self.answers[name])
            for name, relation in RELATIONS.items()
            for asked in relation.asked
        ]


def invent(count: int, seed: int, without: Sequence[Entity] = ()) -> list[Entity]:
    """So many entities, no name twice nor one of those of `without`."""
    rng, names = random.Random(seed), {entity.name for entity in without}
    found: list[Entity] = []
    while len(found) < count:
        first, last = ("".join((rng.choice(_SYLLABLES), rng.choice(_ENDINGS))).title() for _ in range(2))
        if (name := f"{first} {last}") not in names:
            names.add(name)
            answers = {key: rng.randrange(len(relation.answers)) for key, relation in RELATIONS.items()}
            found.append(Entity(name, answers))
    return found
