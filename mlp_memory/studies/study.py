"""A study as work to do: its variants, the stages that each needs, and the first that is missing.

Only process 0 asks what is missing; the caller does it as `run` does a stage, in an interpreter of its own.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from mlp_memory.artifacts import Directory, UserError, first_line
from mlp_memory.config import Config
from mlp_memory.job import Job
from mlp_memory.pipeline import Stage, find_stage
from mlp_memory.recipes import load_config
from mlp_memory.studies import sharing
from mlp_memory.studies.adopt import adopt_stage
from mlp_memory.studies.config import STUDIES
from mlp_memory.studies.curves import curve_stage
from mlp_memory.studies.measure import measure_stage
from mlp_memory.studies.mixer import mixer_measure_stage, mixer_stage
from mlp_memory.studies.variants import (
    CURVE,
    DECODER,
    DECODER_CURVE,
    MEMORY,
    MIXER,
    TEACHER,
    Variant,
    variants_of,
)

FOLDER = "studies"


class Piece(NamedTuple):
    """Work to do: a stage of a variant, both by name."""

    variant: str
    stage: str


class Study:
    """A study over a recipe, every variant's config checked.

    Args:
      name: one of `STUDIES`.
      files, bindings: the recipe; without files, the workdir's.
      workdir: the study's parent; variants are made in its studies/NAME/VARIANT.

    Raises:
      UserError: no such study, a recipe or a variant that is refused.
    """

    def __init__(self, name: str, files: list[str], bindings: list[str], workdir: Directory):
        self.name, self.workdir = name, workdir
        self._files, self._bindings = files, bindings
        self.recipe = load_config(files, bindings, workdir)
        self.variants = {variant.name: variant for variant in variants_of(name, self.recipe)}
        self.configs = {variant.name: self._load(variant) for variant in self.variants.values()}

    def _load(self, variant: Variant) -> Config:
        """The variant's config; what gin has read last is then the variant's."""
        try:
            return load_config(self._files, [*self._bindings, *variant.bindings], self.workdir)
        except UserError as error:
            raise UserError(f"study {self.name}, variant {variant.name}: {first_line(error)}") from error

    @property
    def directory(self) -> Directory:
        """Where the study's findings go."""
        return self.workdir / FOLDER / self.name

    def job(self, variant: Variant) -> Job:
        """The variant's workdir and config."""
        return Job(self.directory / variant.name, self.configs[variant.name])

    def stages(self, variant: Variant) -> list[Stage]:
        """What a variant needs, in order."""
        config = self.configs[variant.name]
        first = ["tokenize", *(() if variant.kind == DECODER_CURVE else ("import", "pretrain"))]
        found = [stage for stage in map(find_stage, first) if stage.wanted(config)]
        if variant.kind in (MEMORY, CURVE, TEACHER, MIXER):
            found.append(find_stage("embed"))
            if variant.teacher:
                found.append(adopt_stage(self.directory / variant.teacher))
            else:
                found += [find_stage("index"), find_stage("retrieve")]
        if variant.kind == MEMORY:
            found.append(find_stage("distill"))
        if variant.kind == MIXER:
            return [*found, mixer_stage(), mixer_measure_stage()]
        if variant.kind in (CURVE, DECODER_CURVE):
            return [*found, curve_stage(variant.kind == CURVE)]
        return [*found, measure_stage(variant.kind == MEMORY)]

    @functools.cached_property
    def _others(self) -> list[Directory]:
        """Workdirs whose artifacts may be taken: the parent, and this recipe's variants of every study."""
        found = [self.workdir, *(self.directory / name for name in self.variants)]
        for study in STUDIES:
            if study != self.name:
                try:
                    names = [variant.name for variant in variants_of(study, self.recipe)]
                except UserError:  # that study's grid is not this one's concern
                    continue
                found += [self.workdir / FOLDER / study / name for name in names]
        return found

    def next_piece(self) -> Piece | None:
        """The first thing to do, None if all is done; artifacts made elsewhere are taken over on the way.

        Raises:
          UserError: a variant holds an artifact that was made otherwise.
        """
        for variant in self.variants.values():
            job = self.job(variant)
            for stage in self.stages(variant):
                if not sharing.finished(job, stage, self._others):
                    return Piece(variant.name, stage.name)
        return None

    def open(self, name: str, stage: str) -> tuple[Job, Stage]:
        """The job and the stage of a piece, given by its parts."""
        variant = self.variants[name]
        self._load(variant)  # the config.gin that is saved is the one read last
        return self.job(variant), next(found for found in self.stages(variant) if found.name == stage)

    @property
    def command(self) -> str:
        """What runs the study again, from the folder that this process works in."""
        where = self.workdir.location
        if self.workdir.is_local and self.workdir.path.is_relative_to(Path.cwd()):
            where = str(self.workdir.path.relative_to(Path.cwd()))
        files = "".join(f" --gin_file={file}" for file in self._files)
        bindings = "".join(f" --gin='{binding}'" for binding in self._bindings)
        return f"python -m mlp_memory study {self.name} --workdir={where}{files}{bindings}"


def is_decoder(variant: Variant) -> bool:
    """Whether its figure is a decoder's alone."""
    return variant.kind in (DECODER, TEACHER)
