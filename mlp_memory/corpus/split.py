"""Which split a document belongs to, what each split holds, and in which order.

The choice hashes the text itself, so exact duplicates share a split, and order, file
names and other documents do not matter. A mixture's parts are split each on its own.
"""

import dataclasses
import hashlib
import heapq
from collections.abc import Iterator, Mapping, Set

from mlp_memory.artifacts import UserError
from mlp_memory.corpus import wikitext
from mlp_memory.corpus.config import SPLITS, CorpusConfig, PartConfig, SourceConfig
from mlp_memory.corpus.documents import Files, files_of_source, naming_part, read_group
from mlp_memory.training.progress import Progress


def unit_hash(salt: str, text_sha256: bytes) -> float:
    """A number in [0, 1), uniform over texts and independent between salts."""
    return int.from_bytes(hashlib.sha256(salt.encode() + b"\0" + text_sha256).digest()[:8], "big") / 2.0**64


def split_of(text: str, group: str, source: SourceConfig, given: Set[str], fraction: float) -> str | None:
    """ "train", "validation" or "test"; None for a train document that `fraction` leaves out.

    Args:
      text: the document.
      group: which of the source's file lists it came from.
      source: held-out fractions.
      given: the groups that have files.
      fraction: share of the train documents kept.
    """
    sha256 = hashlib.sha256(text.encode()).digest()
    split = _whole_split_of(sha256, group, source, given)
    if split == "train" and unit_hash("fraction", sha256) >= fraction:
        return None
    return split


def _whole_split_of(sha256: bytes, group: str, source: SourceConfig, given: Set[str]) -> str:
    if group == "test" or (group == "validation" and "test" in given):
        return group
    if group == "validation":
        return "validation" if unit_hash("half", sha256) < 0.5 else "test"
    position = unit_hash("split", sha256)
    validation = 0.0 if "validation" in given else source.validation_fraction
    test = 0.0 if given & {"validation", "test"} else source.test_fraction
    if position < validation:
        return "validation"
    return "test" if position < validation + test else "train"


def groups_of(split: str, given: Set[str]) -> tuple[str, ...]:
    """The file lists that feed a split, in reading order."""
    if split == "train":
        return ("train",)
    if split in given:
        return (split,)
    return ("validation",) if "validation" in given else ("train",)


def _given(files: Files) -> Set[str]:
    return {group for group in SPLITS if files[group]}


def read_split(
    config: CorpusConfig, files: Files, split: str, facts: "Mapping[str, SplitFacts] | None" = None
) -> Iterator[str]:
    """The texts of a split in a fixed order, empty ones left out.

    Args:
      config, files: what is read.
      split: "train", "validation" or "test".
      facts: what `scan` found; None has it scan now.

    Raises:
      UserError: a file cannot be read (see `documents.read_group`).
    """
    facts = facts or scan(config, files)
    parts = facts[split].parts
    texts = {
        name: _read_source(name, source, files, split, facts["train"].parts[name].fraction)
        for name, source in config.sources.items()
    }
    return interleave(texts, {name: parts[name].bytes for name in texts})


def _read_source(name: str, source: SourceConfig, files: Files, split: str, fraction: float) -> Iterator[str]:
    own_files = files_of_source(files, name)
    given = _given(own_files)
    with naming_part(name):
        for group in groups_of(split, given):
            for text in read_group(source, own_files, group):
                if text and split_of(text, group, source, given, fraction) == split:
                    yield text


def read_whole(source: SourceConfig, files: Files) -> Iterator[str]:
    """Every text of all of a source's files in a fixed order, or the `fraction` of them that a hash keeps.

    Raises:
      UserError: a file cannot be read.
    """
    for group in SPLITS:
        # What reads no files has its documents in one group.
        if files[group] or (group == "train" and not source.train_files):
            for text in read_group(source, files, group):
                sha256 = hashlib.sha256(text.encode()).digest()
                if text and unit_hash("fraction", sha256) < source.fraction:
                    yield text


def count_whole(source: SourceConfig, files: Files) -> "SplitFacts":
    """Counts over `read_whole`'s texts; train is not searched for them.

    Raises:
      UserError: a file cannot be read, or there is no text.
    """
    facts = SplitFacts(word_count=source.word_count, duplicated_documents=None, parts={"": PartFacts()})
    for text in read_whole(source, files):
        _count(text, "", "", source.word_count, {"": facts})
    if not facts.documents:
        raise UserError("no document with text: give files that hold text, or a larger fraction")
    return facts


def interleave(texts: Mapping[str, Iterator[str]], sizes: Mapping[str, int]) -> Iterator[str]:
    """Texts of all iterators, so that each is read through in proportion to its size all along.

    The next text is that of the iterator of which the least share has been read, the first
    of them in order. `seqio.Mixture` is not used: it draws at random, and repeats or cuts
    off what does not come out even, while here each text comes once and in a fixed order.

    Args:
      texts: each iterator keeps its order.
      sizes: UTF-8 bytes of each iterator's texts.
    """
    heap = [(0.0, number, name, 0) for number, name in enumerate(texts)]
    while heap:
        _, number, name, done = heap[0]
        text = next(texts[name], None)
        if text is None:
            heapq.heappop(heap)
            continue
        yield text
        done += len(text.encode())
        heapq.heapreplace(heap, (done / max(sizes[name], 1), number, name, done))


def count_words(text: str, convention: str) -> int:
    """Words by "whitespace", or as "wikitext" counts them (see `wikitext.count_words`)."""
    return wikitext.count_words(text) if convention == "wikitext" else len(text.split())


@dataclasses.dataclass
class PartFacts:
    """What one source gives to one split.

    Attributes:
      documents, words, bytes: as in `SplitFacts`.
      fraction: share of the source's documents that are kept, by hash; 1 but for train.
    """

    documents: int = 0
    words: int = 0
    bytes: int = 0
    fraction: float = 1.0


@dataclasses.dataclass
class SplitFacts:
    """Counts over the documents of one split.

    Attributes:
      documents: with text.
      empty_documents: without any; they are left out of the token stream.
      words: what per-word perplexity is normalised by.
      word_count: how they are counted (see `count_words`); both ways, joined by "+", where a
        mixture's parts differ.
      bytes: of the texts in UTF-8.
      duplicated_documents: of validation or test, whose exact text is in train too; None where train
        was not searched.
      parts: by name; "" is the only one where the corpus is no mixture.
    """

    documents: int = 0
    empty_documents: int = 0
    words: int = 0
    word_count: str = "whitespace"
    bytes: int = 0
    duplicated_documents: int | None = 0
    parts: dict[str, PartFacts] = dataclasses.field(default_factory=dict)


def scan(config: CorpusConfig, files: Files) -> dict[str, SplitFacts]:
    """Reads every document once (twice where a mixture has rates), before anything is written, and counts.

    Raises:
      UserError: a document cannot be read, there is none with text, or a split is empty.
    """
    fractions = _fractions(config, files)
    facts = {}
    for split in SPLITS:
        parts = {name: PartFacts(fraction=fractions[name] if split == "train" else 1.0) for name in fractions}
        facts[split] = SplitFacts(word_count=_word_count(config), parts=parts)
    # Held-out texts by hash: how many documents of each split have it. Train is read last
    # and takes them out, so memory grows with the held-out texts alone.
    held_out: dict[bytes, dict[str, int]] = {}
    # Where everything is split by one hash, a text cannot be on two sides.
    can_repeat = config.parts or _given(files) & {"validation", "test"}
    with Progress("read documents", sum(map(len, files.values())), "files") as progress:
        for group in ("validation", "test", "train"):
            for name, source in config.sources.items():
                own_files = files_of_source(files, name)
                for one_file in [{group: [path]} for path in own_files[group]] or [{group: []}]:
                    with naming_part(name):
                        for text in read_group(source, one_file, group):
                            split = split_of(text, group, source, _given(own_files), fractions[name])
                            if split is not None:
                                _count(text, split, name, source.word_count, facts)
                                if text and can_repeat:
                                    _count_duplicates(text, split, facts, held_out)
                    progress.advance(len(one_file[group]))
    _check(config, files, facts)
    return facts


def _fractions(config: CorpusConfig, files: Files) -> dict[str, float]:
    """The share of its train documents that each source keeps.

    With rates it is such that the bytes kept are in the proportion of the rates and the part
    that is scarcest for its rate is kept whole (less its own and the corpus' fraction).
    """
    sources = config.sources
    if not any(isinstance(source, PartConfig) and source.rate for source in sources.values()):
        return {
            name: source.fraction * (1.0 if source is config else config.fraction)
            for name, source in sources.items()
        }
    sizes = {}
    with Progress("measure parts", len(sources), "parts") as progress:
        for name, source in sources.items():
            train = _read_source(name, source, files, "train", source.fraction)
            sizes[name] = sum(len(text.encode()) for text in train)
            if not sizes[name]:
                raise UserError(f"part {name!r} has no train text: give it more files, or take it out")
            progress.advance(1)
    scarcest = min(sizes[name] / source.rate for name, source in sources.items())
    return {
        name: config.fraction * source.fraction * min(1.0, scarcest * source.rate / sizes[name])
        for name, source in sources.items()
    }


def _word_count(config: CorpusConfig) -> str:
    return "+".join(sorted({source.word_count for source in config.sources.values()}))


def _count(text: str, split: str, name: str, convention: str, facts: dict[str, SplitFacts]) -> None:
    if not text:
        facts[split].empty_documents += 1
        return
    words, size = count_words(text, convention), len(text.encode())
    for counts in (facts[split], facts[split].parts[name]):
        counts.documents += 1
        counts.words += words
        counts.bytes += size


def _count_duplicates(
    text: str, split: str, facts: dict[str, SplitFacts], held_out: dict[bytes, dict[str, int]]
) -> None:
    sha256 = hashlib.sha256(text.encode()).digest()
    if split != "train":
        counts = held_out.setdefault(sha256, {})
        counts[split] = counts.get(split, 0) + 1
    else:
        for other, count in held_out.pop(sha256, {}).items():
            facts[other].duplicated_documents += count


def _check(config: CorpusConfig, files: Files, facts: dict[str, SplitFacts]) -> None:
    documents = sum(f.documents for f in facts.values())
    if not documents:
        where = ", ".join(config.train_files[:3]) or ", ".join(config.parts) or config.source
        raise UserError(f"no document with text in {where}: give files that hold text")
    for split in SPLITS:
        if not facts[split].documents:
            raise UserError(_empty_split(split, config, files, documents))
    for name, part in facts["train"].parts.items():
        if not part.documents:
            raise UserError(
                f"part {name!r} gives no train document: raise its rate or fraction, or take it out"
            )


def _empty_split(split: str, config: CorpusConfig, files: Files, documents: int) -> str:
    found = f"the {split} split is empty ({documents} documents with text in all)"
    if split == "train":
        return f"{found}: raise fraction (now {config.fraction:g}) or give more train_files"
    if config.parts:
        return f"{found}: raise a part's {split}_fraction or give one {split}_files"
    given = _given(files)
    if groups_of(split, given) == ("train",):
        value = getattr(config, f"{split}_fraction")
        return f"{found}: raise {split}_fraction (now {value:g}), give {split}_files or more documents"
    if split in given and (split == "test" or "test" in given):
        return f"{found}: {split}_files hold no text, give others"
    return f"{found}: validation and test share validation_files; add documents to them or give test_files"
