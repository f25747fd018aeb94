"""python -m mlp_memory STAGE: flags and gin, nothing else."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import warnings
from typing import TYPE_CHECKING

from mlp_memory import artifacts, pipeline
from mlp_memory.artifacts import Directory, UserError, first_line
from mlp_memory.flags import parser
from mlp_memory.job import Job, is_there
from mlp_memory.recipes import SAVED, load_config, resolved_gin
from mlp_memory.updating.request import RECORD

if TYPE_CHECKING:
    from mlp_memory.parallel.hosts import Hosts


def _plan_training(args: argparse.Namespace) -> None:
    from mlp_memory.parallel.chips import find_topology
    from mlp_memory.plan import ADVICE, plan_training, training_table

    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f"--price = {args.price}: give dollars for a chip's hour, 0 or more")
    topology = find_topology(args.topology)
    plan = plan_training(args.what, load_config(args.gin_file, args.gin, None), topology, args.price)
    print(training_table(plan))
    if args.json:
        folder, _, name = os.path.abspath(args.json).rpartition("/")
        Directory(folder).write(name, json.dumps(dataclasses.asdict(plan), indent=1).encode())
    if not plan.fits:
        raise UserError(f"{plan.stage} does not fit {plan.topology}: {ADVICE}")


def _plan_retrieve(args: argparse.Namespace) -> None:
    from mlp_memory.targets.plan import plan_retrieve, plan_table

    for name, value in (("--dim", args.dim), ("--k", args.k), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} = {value}: give 1 or more")
    try:
        rows = float(args.rows.replace(",", "").replace("_", ""))
    except ValueError:
        rows = math.nan
    if not 1 <= rows < math.inf:
        raise UserError(f"--rows = {args.rows}: give the tokens of the datastore, 1 or more")
    bindings = [*args.gin, *([f"retrieve.k = {args.k}"] if args.k else [])]
    config = load_config(args.gin_file, bindings, None)
    decoder = config.decoder
    if args.dim and args.dim != decoder.dim:
        # A decoder of that width, its heads as wide as before.
        heads = max(args.dim // decoder.head_dim, 1)
        decoder = dataclasses.replace(
            decoder, dim=args.dim, heads=heads, kv_heads=0, head_size=decoder.head_dim, ffn_dim=0
        )
    needs = plan_retrieve(int(rows), decoder, config.embed, config.index, config.retrieve)
    print(plan_table(int(rows), needs, args.workers))


def _run(args: argparse.Namespace, job: Job) -> None:
    """Does the first stage that is missing, then starts afresh for the next one.

    Starting afresh in the same process id gives each stage an interpreter of its own, so
    that training never runs beside TensorFlow, and a kill always hits the stage at work.
    """
    from mlp_memory.parallel.hosts import joined
    from mlp_memory.workdir import status_table

    with joined(job.config.hosts) as hosts:
        name = hosts.agree(_first_missing(job) if hosts.index == 0 else None)
        if name:
            stage = pipeline.find_stage(name)
            if hosts.index == 0:
                print(f"--- {stage.name}: {stage.help}", flush=True)
            _work(job, stage, hosts)
    if name:
        _start_afresh()
    if hosts.index == 0:
        print(status_table(job), file=sys.stderr)
        _show_results(job)
        _show_benchmarks(job)


def _start_afresh() -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "mlp_memory", *sys.argv[1:]])


def _study(args: argparse.Namespace) -> None:
    """Does the first stage that a variant lacks, then starts afresh, as `_run` does; shows the findings."""
    from mlp_memory.parallel.hosts import joined
    from mlp_memory.studies.conclude import conclude
    from mlp_memory.studies.plan import plan_table
    from mlp_memory.studies.study import Study
    from mlp_memory.workdir import exclusive

    study = Study(args.name, args.gin_file, args.gin, Directory(args.workdir))
    if args.dry_run:
        return print(plan_table(study))
    with joined(study.recipe.hosts) as hosts, contextlib.ExitStack() as stack:
        if hosts.index == 0:  # two studies at once would make twice what they share
            stack.enter_context(exclusive(study.workdir / "studies"))
        if piece := hosts.agree(study.next_piece() if hosts.index == 0 else None):
            job, stage = study.open(*piece)
            print(f"--- {job.workdir}: {stage.name}: {stage.help}", flush=True)
            _work(job, stage, hosts)
    if piece:
        _start_afresh()
    if hosts.index == 0:
        print(conclude(study))


def _update(args: argparse.Namespace) -> None:
    """Does the first stage that the update lacks, then starts afresh, as `_run` does."""
    from mlp_memory.parallel.hosts import joined
    from mlp_memory.updating.request import read_request
    from mlp_memory.updating.update import Update, summary
    from mlp_memory.verify.verify import saved_config

    base, workdir = Directory(args.workdir), Directory(args.output)
    config = load_config(args.gin_file, args.gin, base, saved_config(workdir))
    update = Update(read_request(base, args.add, args.delete, config.corpus.text_field), workdir, config)
    with joined(config.hosts) as hosts:
        stage = None
        if hosts.index == 0:
            update.prepare()
            stage = update.next_stage()
        name = hosts.agree(stage.name if stage else None)
        if name:
            stage = next(stage for stage in update.stages() if stage.name == name)
            if hosts.index == 0:
                print(f"--- update: {stage.name}: {stage.help}", flush=True)
            _work(update.job, stage, hosts)
    if name:
        _start_afresh()
    if hosts.index == 0:
        print(summary(update.base, update.job))


def _verify(args: argparse.Namespace) -> None:
    """Ends with exit code 1 where something is not as it was made."""
    from mlp_memory.verify.verify import saved_config, verify

    workdir = Directory(args.workdir)
    job = Job(workdir, load_config(args.gin_file, args.gin, workdir, saved_config(workdir)))
    flags = [f"--gin_file={name}" for name in args.gin_file] + [f"--gin={text}" for text in args.gin]
    if not verify(job, flags, args.repair):
        sys.exit(1)


def _first_missing(job: Job) -> str | None:
    """The name of the first stage to do; None where all is done."""
    wanted = (stage for stage in pipeline.STAGES if stage.wanted(job.config))
    return next((stage.name for stage in wanted if not stage.is_done(job)), None)


def _one_stage(job: Job, stage: pipeline.Stage) -> None:
    from mlp_memory.parallel.hosts import joined

    with joined(job.config.hosts) as hosts:
        if not hosts.agree(hosts.index == 0 and stage.is_done(job)):
            _work(job, stage, hosts)
        elif hosts.index == 0:
            print(f"{stage.name}: done before, in {job.workdir / stage.folder}", file=sys.stderr)
    if hosts.index == 0 and stage.name == "evaluate":
        _show_results(job)
    if hosts.index == 0 and stage.name == "benchmark":
        _show_benchmarks(job)


def _work(job: Job, stage: pipeline.Stage, hosts: "Hosts") -> None:
    """Does a stage; where there are several processes, together or by process 0, which writes for all.

    What process 0 does alone it does as if there were no others, on its own devices; they
    wait for it where they take leave.
    """
    import jax

    from mlp_memory.evaluation.harness.ready import check
    from mlp_memory.workdir import exclusive, timed

    if stage.together:
        hosts.start_jax()
    elif hosts.index > 0:
        return
    elif hosts.count > 1:
        mesh = job.config.mesh.of_one_process(jax.device_count())
        job = Job(job.workdir, dataclasses.replace(job.config, mesh=mesh))
    # An impossible mesh, a memory of another decoder or a benchmark without its data is told before any work.
    job.config.mesh.sizes(jax.device_count())
    job.check_memory()
    check(job.config.benchmark)
    if hosts.index > 0:
        hosts.agree()  # process 0 has the workdir for this job
        stage.work(job, job.workdir / stage.folder)
        return
    with exclusive(job.workdir):
        hosts.agree()
        with timed(job.workdir, stage):
            stage.work(job, job.workdir / stage.folder)
        artifacts.write_sealed(job.workdir, SAVED, resolved_gin(), RECORD)
    if not stage.is_done(job):  # or `run` would do it for ever
        raise UserError(f"{stage.name} has ended and {job.workdir / stage.folder} is unfinished: run verify")


def _show_results(job: Job) -> None:
    from mlp_memory.evaluation.table import results_table

    data = job.workdir.read("reports/results.json")
    if data is not None:
        print(results_table(json.loads(data)))
        print(f"\nreport: {job.workdir}/reports/index.html")


def _report(job: Job) -> None:
    from mlp_memory.evaluation.page import draw, read_results
    from mlp_memory.workdir import exclusive

    results, made = None, artifacts.peek(job.workdir / "reports")
    if made is not None and made.finished:
        job.manifest("reports")  # results of models that are there no more are refused
        results = read_results(job.workdir)
    with exclusive(job.workdir):
        draw(job.workdir, results)
    print(f"report: {job.workdir}/reports/index.html")


def _show_benchmarks(job: Job) -> None:
    from mlp_memory.evaluation.harness.findings import benchmark_table

    if job.config.benchmark.wanted and (data := job.workdir.read("benchmarks/results.json")) is not None:
        print(benchmark_table(json.loads(data)))
        print(f"\nevery example: {job.workdir}/benchmarks/examples")


def _generate(args: argparse.Namespace, job: Job) -> None:
    from mlp_memory.language_model import language_model

    prompts, many = args.prompt, args.model == "both" or len(args.prompt) > 1
    for title in ("base", "base_plus_memory") if args.model == "both" else (args.model,):
        model = language_model(job, title, None if title == "base" else args.interpolation)
        # One prompt's text is shown as it grows, several are continued as one batch.
        texts = [model.stream(prompts[0])] if len(prompts) == 1 else [[t] for t in model.generate(prompts)]
        for prompt, pieces in zip(prompts, texts):
            print(f"[{title}] {prompt}", end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print("\n" if many else "")


def _export_serving(args: argparse.Namespace, job: Job) -> None:
    from mlp_memory.interchange.serving import export_serving
    from mlp_memory.language_model import language_model

    weight = None if args.model == "base" else args.interpolation
    model = language_model(job, args.model, weight, args.dtype)
    export_serving(Directory(args.output), model.mixture, model.vocabulary, model.config, args.model)
    print(f"{args.output}: python {args.output}/serve.py --help")


def _setting(source: str) -> str:
    """Which of the `pretrained` section's models this is; what is gone is taken to have been a decoder."""
    from mlp_memory.interchange.source import open_source

    return "memory" if is_there(source) and open_source(source).kind == "memory" else "source"


def _dispatch(args: argparse.Namespace) -> None:
    if args.stage == "study":
        return _study(args)
    if args.stage == "update":
        return _update(args)
    if args.stage == "verify":
        return _verify(args)
    if args.stage == "plan":
        plan = _plan_retrieve if args.what == "retrieve" else _plan_training
        plan(args)
        return
    workdir = Directory(args.workdir)
    source = getattr(args, "source", None)
    bindings = [*args.gin, *([f"pretrained.{_setting(source)} = {source!r}"] if source else [])]
    config = load_config(args.gin_file, bindings, workdir)
    job = Job(workdir, config)
    if args.dry_run:
        from mlp_memory.dry_run import shapes_table

        print(resolved_gin())
        print(shapes_table(config))
    elif args.stage == "run":
        _run(args, job)
    elif args.stage == "status":
        from mlp_memory.workdir import status_table

        print(status_table(job))
    elif args.stage == "report":
        _report(job)
    elif args.stage == "generate":
        _generate(args, job)
    elif args.stage == "export_serving":
        _export_serving(args, job)
    elif args.stage in ("trace", "documents"):
        from mlp_memory.tracing import command

        (command.show_trace if args.stage == "trace" else command.show_documents)(args, job)
    else:
        importing = args.stage == "import"
        _one_stage(job, pipeline.import_stage(job, source) if importing else pipeline.find_stage(args.stage))


def main() -> None:
    """Runs one command; ends with exit code 2 and one line for anything the user can mend."""
    args = parser().parse_args()
    try:
        _dispatch(args)
    except UserError as error:
        # Orbax leaves reads behind that a damaged file cut short, and Python would tell of each.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
