"""Gin files and bindings to a `Config`: the only importer of gin."""

import dataclasses
import logging
import re
from pathlib import Path

import gin
from gin import config_parser

from mlp_memory.artifacts import Directory, UserError, first_line
from mlp_memory.config import Config
from mlp_memory.corpus.config import PartConfig
from mlp_memory.settings import nearest

SAVED = "config.gin"
"""The workdir's file of the resolved config."""

_PART = "part"
_RUNS_PROGRAMS = ("fleet.options", "benchmark.lm_eval_include")
"""Settings that name programs, or files that hold some: not taken from a workdir unasked."""

SECTIONS = {
    field.name: gin.external_configurable(field.default_factory, name=field.name, module="mlp_memory")
    for field in dataclasses.fields(Config)
}
# A mixture's parts: corpus.parts = {"books": @books/part()}, then books/part.source = "jsonl".
gin.external_configurable(PartConfig, name=_PART, module="mlp_memory")


def load_config(
    files: list[str], bindings: list[str], workdir: Directory | None, text: str | None = None
) -> Config:
    """The config of these gin files and bindings; without files, of the workdir's config.gin if there is one.

    Args:
      files: gin files.
      bindings: NAME.PARAM=VALUE, after them.
      workdir: whose config.gin is read where there are no files.
      text: to be read in its place.

    Raises:
      UserError: a file is missing, a name unknown, a value impossible.
    """
    gin.clear_config()
    saved = []
    if not files and workdir is not None and (not workdir.is_local or workdir.path.is_dir()):
        saved = [workdir.read(SAVED) if text is None else text.encode()]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--gin_file {file!r} does not exist: gin_configs/recipes holds the recipes")
        for folder in list(Path(file).resolve().parents)[:2]:
            gin.add_config_file_search_path(str(folder))
    # gin logs every folder of its search path that does not hold an included file.
    logging.disable(logging.ERROR)
    try:
        for data in saved:
            text = (data or b"").decode()
            _check_saved(text, f"{workdir}/{SAVED}")
            gin.parse_config(text)
        gin.parse_config_files_and_bindings(files, bindings, finalize_config=False)
        return Config(**{name: section() for name, section in SECTIONS.items()})
    except UserError as error:
        raise UserError(_naming_part(error)) from error
    except Exception as error:  # gin raises many kinds, and adds lines of its own to any of them
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        raise UserError(_explain(cause)) from error
    finally:
        logging.disable(logging.NOTSET)


class _Values(config_parser.ParserDelegate):
    """What values of a saved config may name beside literals: a mixture's parts, and macros."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        if not evaluate or scoped_configurable_name.split("/")[-1] != _PART:
            raise ValueError(f"@{scoped_configurable_name}")
        return scoped_configurable_name

    def macro(self, macro_name: str) -> str:
        return macro_name


def _check_saved(text: str, where: str) -> None:
    """Raises `UserError` unless a saved config is only values of our own settings.

    Gin files are code: they import modules, include other files and call what these define. A workdir is
    data, perhaps someone else's, so of its config only what `resolved_gin` writes is taken.
    """
    wrong = ""
    try:
        for statement in config_parser.ConfigParser(text, _Values()):
            if not isinstance(statement, config_parser.BindingStatement):
                wrong = type(statement).__name__.removesuffix("Statement").lower()
            elif statement.selector not in (*SECTIONS, _PART, "macro", "") and statement.arg_name:
                wrong = f"{statement.selector}.{statement.arg_name}"
            elif (name := f"{statement.selector}.{statement.arg_name}") in _RUNS_PROGRAMS and statement.value:
                wrong = name
            if wrong:
                break
    except Exception as error:  # the parser raises many kinds
        wrong = first_line(error)
    if wrong:
        raise UserError(
            f"{where} holds {wrong!r}, which could run programs or is damaged: "
            "give the recipe by --gin_file, this file itself if you trust it"
        )


def _naming_part(error: UserError) -> str:
    """The message, after the part of a mixture that it is about; gin adds its name on a line of its own."""
    part = re.search(rf"configurable '{_PART}' .* in scope '([^']+)'", str(error))
    return f"{part.group(1)}/{_PART}: {first_line(error)}" if part else first_line(error)


def _explain(error: BaseException) -> str:
    """gin's message in one line, with the nearest known name."""
    text = " ".join(str(error).split())[:300]
    if found := re.search(r"[Nn]o configurable matching '([^']+)'", text):
        name, known = found.group(1), [*SECTIONS, _PART]
    elif found := re.search(r"'([^']+)' doesn't have a parameter named '([^']+)'", text):
        section = found.group(1).rsplit(".", 1)[-1]
        fields = {f.name: f.default_factory for f in dataclasses.fields(Config)} | {_PART: PartConfig}
        name = found.group(2)
        known = [f.name for f in dataclasses.fields(fields[section])] if section in fields else []
    else:
        return f"gin: {text}"
    return f"gin: {text} ({nearest(name, known)})"


def resolved_gin() -> str:
    """What `load_config` read last, every setting spelt out."""
    return gin.operative_config_str()
