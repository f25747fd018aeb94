"""What a study would make: its variants, their sizes, and which artifacts they share."""

import dataclasses
import functools
import math
from typing import Any

from mlp_memory.artifacts import Directory, Manifest
from mlp_memory.dry_run import resolved_shapes
from mlp_memory.evaluation.sections import Table
from mlp_memory.job import Job
from mlp_memory.studies import sizes
from mlp_memory.studies.curves import for_epochs
from mlp_memory.studies.mixer import mixer_parameters, mixer_shape
from mlp_memory.studies.results import figure, text_table
from mlp_memory.studies.study import Study
from mlp_memory.studies.variants import CURVE, DECODER_CURVE, MEMORY, MIXER, Variant


class _Planned(Job):
    """A job whose artifacts are foreseen: their settings and parents are real, nothing else is.

    Artifacts of equal fingerprints here are those that will be shared.
    """

    def __init__(self, study: Study, variant: Variant, teacher: "_Planned | None"):
        super().__init__(Directory("/nonexistent"), study.configs[variant.name])
        self.stages = {stage.folder: stage for stage in study.stages(variant)}
        self._teacher = teacher

    @functools.cached_property
    def _facts(self) -> dict[str, dict[str, Any]]:
        """What later stages ask of a folder's facts."""
        decoder, _ = resolved_shapes(self.config)
        return {"corpus": {"vocab_size": decoder.vocab_size}, "datastore": {"dim": decoder.dim}}

    def manifest(self, name: str) -> Manifest:
        if name not in self._manifests:
            folder = name.split("/")[0]
            stage = self.stages[folder]
            parents = {parent: self.manifest(parent).fingerprint for parent in stage.parents(self.config)}
            if stage.name == "adopt":
                settings = {"taken_from": self._teacher.manifest("targets").fingerprint}
            else:
                settings = stage.settings(self)
            self._manifests[name] = Manifest(name, settings, parents, facts=self._facts.get(folder, {}))
        return self._manifests[name]


def plan_table(study: Study) -> str:
    """The variants with what they change, cost and share.

    Raises:
      UserError: a variant whose shapes are impossible.
    """
    jobs: dict[str, _Planned] = {}
    made: dict[tuple[str, str], str] = {}
    rows = []
    for variant in study.variants.values():
        job = jobs[variant.name] = _Planned(study, variant, jobs.get(variant.teacher))
        new, shared = [], {}
        for folder, stage in job.stages.items():
            name = "corpus/train" if folder == "corpus" else folder
            key = (stage.name, job.manifest(name).fingerprint)
            maker = made.setdefault(key, variant.name)
            if maker == variant.name:
                new.append(stage.name)
            else:
                shared.setdefault(maker, []).append(stage.name)
        cells = [", ".join(new) or "–"]
        cells += ["; ".join(f"{', '.join(names)}: {maker}" for maker, names in shared.items()) or "–"]
        rows.append((variant.name, *_sizes(study, variant), *cells))
    columns = ("variant", "parameters", "training FLOPs", "makes", "shares")
    notes = (
        "Parameters and FLOPs by the vocabulary's intended size; a datastore's FLOPs are apart.",
        f"Artifacts alike in {study.workdir} and in the other studies there are taken as well.",
    )
    table = text_table(Table(f"study {study.name}: {len(rows)} variants", columns, tuple(rows), notes))
    sets = (f"{v.name}: {'; '.join(v.bindings) or 'the recipe as it is'}" for v in study.variants.values())
    return "\n".join([table, "", *sets])


def _sizes(study: Study, variant: Variant) -> tuple[str, str]:
    config = study.configs[variant.name]
    cost = sizes.cost(config, variant.kind in (MEMORY, CURVE))
    if variant.kind == MIXER:
        shape = mixer_shape(*resolved_shapes(config))
        rows = config.distill.steps * config.distill.batch_size * config.distill.block_rows
        cost = dataclasses.replace(
            cost,
            memory=mixer_parameters(*resolved_shapes(config)),
            memory_flops=shape.train_flops(rows, config.embed.context),
        )
    if variant.kind not in (CURVE, DECODER_CURVE):
        return figure(cost.parameters), figure(cost.train_flops)
    # How many steps an epoch has is known once the corpus is tokenized; of a made-up million rows here.
    training = config.distill if variant.kind == CURVE else config.pretrain
    per_step = training.batch_size * (training.block_rows if variant.kind == CURVE else training.context)
    steps = for_epochs(training, 10**6, per_step, study.recipe.study.epochs, study.recipe.study.checks).steps
    decoder, memory = resolved_shapes(config)
    if variant.kind == CURVE:
        flops = memory.train_flops(steps * per_step)
    else:
        flops = decoder.train_flops(steps * per_step, training.context)
    return figure(cost.parameters), f"{figure(math.ceil(flops / 1e6))} a token of the corpus"
