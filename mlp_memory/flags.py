"""The flags of every command, and what --help says of them."""

import argparse

from mlp_memory import pipeline
from mlp_memory.inference.config import MODELS, WITHOUT_SEARCH
from mlp_memory.studies.config import STUDIES

_EPILOG = """\
A recipe is a gin file; gin_configs/recipes has some. Any of its values can be set on the
command line:

  python -m mlp_memory run --workdir=runs/demo --gin_file=gin_configs/recipes/demo.gin
  python -m mlp_memory run --workdir=runs/mine --gin_file=gin_configs/recipes/demo.gin \\
      --gin='corpus.source="text"' --gin='corpus.train_files=["notes/*.txt"]'
  python -m mlp_memory generate --workdir=runs/demo --prompt='A list is'

Once a workdir holds a stage, --gin_file may be left out: its config.gin is used.
A killed run goes on where it stopped when the same command is given again.
"""
_UPDATE_EPILOG = """\
  python -m mlp_memory update --workdir=runs/demo --output=runs/demo2 --add='news/*.jsonl'
  python -m mlp_memory update --workdir=runs/demo2 --output=runs/demo3 --delete=17,40-42 --delete=old.jsonl

Files are one document each, or JSON lines (.jsonl, a "text" each), parquet or WikiText (.tokens), packed
or not. A document to delete is one whose tokens are those of a document in the file. The workdir that is
updated stays as it is; delete it once nothing should be left of what was deleted. A killed update
goes on where it stopped when the same command is given again.

Additions cost what is added. A deletion has index, teachers and memory made anew of what is left: one that
is only trained on keeps much of what it knew (--gin='update.memory="trained_on"' where that will do).
"""
_PLAN_EPILOG = """\
For Wikipedia's five billion tokens and Llama-2-7B, keys as 256 numbers of one byte, 500 workers:

  python -m mlp_memory plan retrieve --rows=5e9 --workers=500 \\
      --gin_file=gin_configs/recipes/paper_llama2_7b_wikipedia.gin \\
      --gin='embed.key_dtype="int8"' --gin='embed.key_dim=256'
"""
_PLAN_TRAINING_EPILOG = """\
A machine without TPUs can compile for them; make plan prepares what that needs:

  make plan ARGS='distill --topology=v5p-64 --gin_file=gin_configs/recipes/paper_mistral_7b_wikipedia.gin \\
      --gin_file=gin_configs/scale/v5p_64.gin'

For GPUs (h100-8, h100-64, h200-8) any environment will do.
"""
TRAININGS = ("distill", "pretrain", "joint")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `stage` is the command's name."""
    whole = argparse.ArgumentParser(
        prog="python -m mlp_memory",
        description="Pretrain a decoder, build its kNN teacher, distil it into an MLP memory, measure both.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = whole.add_subparsers(dest="stage", required=True, metavar="STAGE")
    commands = {
        "run": "every stage that is not yet done",
        **{stage.name: stage.help for stage in pipeline.STAGES},
        "generate": "continue a prompt, with and without memory",
        "export_serving": "a model as StableHLO programs that run without this package",
        "trace": "which training text stands behind rows and predictions",
        "documents": "numbers, tokens and titles of the documents",
        "report": "the report page again, with what benchmarks and studies have found",
        "status": "each stage's state, size and time",
    }
    for name, text in commands.items():
        command = stages.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--workdir", required=True, help="folder of all artifacts: a path, gs:// or s3://"
        )
        _add_recipe(command)
        command.add_argument(
            "--dry_run", action="store_true", help="print the resolved config with every shape, and stop"
        )
        if name == "import":
            command.add_argument(
                "--from",
                dest="source",
                metavar="DIR_OR_FILE",
                help="a decoder (pretrained.source): Hugging Face folder, GGUF or llama2.c file; "
                "or a memory's folder (pretrained.memory)",
            )
        if name == "export_serving":
            command.add_argument("--output", required=True, metavar="DIR", help="a path, gs:// or s3://")
            command.add_argument("--model", choices=WITHOUT_SEARCH, default="base_plus_memory")
            command.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
        if name == "generate":
            command.add_argument(
                "--prompt",
                action="append",
                required=True,
                help="text to continue; may be given again: all are continued as one batch",
            )
            command.add_argument(
                "--model",
                choices=("both", *MODELS),
                default="both",
                help="both: base, then base with memory",
            )
        if name == "trace":
            _add_trace(command)
        if name == "documents":
            command.add_argument("--split", default="train", help="train, or another split")
            command.add_argument("--containing", metavar="TEXT", help="only those whose text holds this")
        if name in ("generate", "export_serving", "trace"):
            command.add_argument(
                "--interpolation",
                type=_interpolation,
                metavar="LAMBDA",
                help="the memory's share, or gate: a share of each token's own; "
                "the best on validation if left out",
            )
    _add_update(stages)
    _add_verify(stages)
    _add_study(stages)
    _add_plan(stages)
    return whole


def _interpolation(text: str) -> float | str:
    return text if text == "gate" else float(text)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gin_file", action="append", default=[], help="recipe; may be given again")
    command.add_argument(
        "--gin", action="append", default=[], metavar="NAME.PARAM=VALUE", help="binding; may be given again"
    )


def _add_update(stages: argparse._SubParsersAction) -> None:
    text = "documents added to a memory without making it again, or deleted from it"
    update = stages.add_parser(
        "update",
        help=text,
        description=text,
        epilog=_UPDATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    update.add_argument("--workdir", required=True, help="what is updated; it stays as it is")
    update.add_argument("--output", required=True, help="workdir of the update")
    update.add_argument(
        "--add", action="append", default=[], metavar="FILE", help="documents; may be given again"
    )
    update.add_argument(
        "--delete",
        action="append",
        default=[],
        metavar="NUMBERS_OR_FILE",
        help="documents of the train stream, by number or as a file; may be given again",
    )
    _add_recipe(update)


def _add_verify(stages: argparse._SubParsersAction) -> None:
    text = "whether every file of a workdir is as it was made; --repair makes again what is not"
    verify = stages.add_parser("verify", help=text, description=f"{text}. Exit code 1: something is not.")
    verify.add_argument("--workdir", required=True, help="a path, gs:// or s3://")
    verify.add_argument("--repair", action="store_true", help="make again just what is damaged")
    _add_recipe(verify)


def _add_trace(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--row", dest="rows", type=int, action="append", default=[], help="of the split; may be given again"
    )
    command.add_argument("--split", default="train", help="whose rows: train, test, ...")
    command.add_argument(
        "--prompt",
        dest="prompts",
        metavar="TEXT",
        action="append",
        default=[],
        help="text to continue by the likeliest tokens; may be given again",
    )
    command.add_argument("--continue", dest="tokens", type=int, default=5, metavar="N", help="for N tokens")
    command.add_argument(
        "--neighbors", type=int, default=8, metavar="K", help="training positions shown with their text"
    )
    command.add_argument("--json", metavar="FILE", help="the same as JSON")


def _add_study(stages: argparse._SubParsersAction) -> None:
    text = "a recipe with one thing varied, and what the paper claims of it"
    study = stages.add_parser("study", help=text, description=text)
    study.add_argument("name", choices=STUDIES, help="; ".join(": ".join(item) for item in STUDIES.items()))
    study.add_argument("--workdir", required=True, help="folder of the studies: a path, gs:// or s3://")
    _add_recipe(study)
    study.add_argument("--dry_run", action="store_true", help="print the variants and what they share")


def _add_plan(stages: argparse._SubParsersAction) -> None:
    text = "what stages would need at another size, or trainings on chips that are not here"
    plan = stages.add_parser("plan", help=text, description=text)
    whats = plan.add_subparsers(dest="what", required=True, metavar="WHAT")
    texts = {
        "retrieve": "embed, index and retrieve: disk, memory, worker-hours, on paper",
        **{name: f"{name}, compiled for a topology: memory, time, cost" for name in TRAININGS},
    }
    for name, text in texts.items():
        what = whats.add_parser(
            name,
            help=text,
            description=text,
            epilog=_PLAN_EPILOG if name == "retrieve" else _PLAN_TRAINING_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_recipe(what)
        if name == "retrieve":
            what.add_argument("--rows", required=True, help="tokens of the datastore: 600e6, say")
            what.add_argument("--dim", type=int, help="of a hidden state (decoder.dim)")
            what.add_argument("--k", type=int, help="neighbours (retrieve.k)")
            what.add_argument("--workers", type=int, default=1, help="processes of two cores")
        else:
            what.add_argument("--topology", required=True, help="v5e-16, v5p-64, v5p:4x4x4, h100-8, ...")
            what.add_argument("--price", type=float, help="dollars for a chip's hour; list price if left out")
            what.add_argument("--json", metavar="FILE", help="the same as JSON")
