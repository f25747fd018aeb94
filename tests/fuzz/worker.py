"""Reads damaged files for `fuzz.py`, one case after the other, in a process that may die of it.

A line on standard input is `reader<TAB>folder`; the answer is a line of JSON: how it ended, and what
memory it took beside. Memory is bounded; what a reader must never do ends the case as a finding.
"""

import faulthandler
import json
import os
import resource
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

MEMORY = 3 << 30
"""Bytes of addresses a reader may take beside what was there when it began."""

_FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
)


class Forbidden(BaseException):
    """What no reader may do; no `except Exception` hides it."""


_folder: Path | None = None
_broken: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if _folder is None:
        return
    if event in _FORBIDDEN:
        _broken.append(f"{event} {arguments!r}"[:300])
        raise Forbidden(_broken[-1])
    writes = (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writes or event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        path = arguments[0]
        if isinstance(path, int):
            return
        # What is removed file by file is named below an open folder.
        below = arguments[-1] if event in ("os.remove", "os.rmdir") and arguments[-1] != -1 else None
        base = os.getcwd() if below is None else os.readlink(f"/proc/self/fd/{below}")
        place = os.path.realpath(os.path.join(base, os.fsdecode(path)))
        if not place.startswith((f"{_folder}/", tempfile.gettempdir() + "/", "/dev/")) and place not in (
            str(_folder),
            tempfile.gettempdir(),
        ):
            _broken.append(f"{event} {path!r}"[:300])
            raise Forbidden(_broken[-1])


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _has_memory_error(error: BaseException) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) and type(error).__module__ == "builtins":
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """The innermost line of ours, so that one fault counts once."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "mlp_memory" in f.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def run(reader: "Reader", folder: Path) -> dict[str, str]:  # noqa: F821
    """How one case ended."""
    global _folder
    from mlp_memory.artifacts import UserError

    _broken.clear()
    before, began, _folder = _peak(), time.monotonic(), folder
    try:
        reader.read(folder)
        end = {"end": "read"}
    except UserError as error:
        lines = str(error).splitlines()
        end = {"end": "refused", "message": str(error)[:300]}
        if len(lines) != 1 or not str(error).isprintable():
            end = {
                "end": "finding",
                "what": f"UserError is no one printable line: {str(error)[:200]!r}",
                "at": _place(error),
            }
        elif _has_memory_error(error):
            end = {"end": "finding", "what": "out of memory before it was refused", "at": _place(error)}
    except BaseException as error:
        end = {"end": "finding", "what": f"{type(error).__name__}: {str(error)[:200]}", "at": _place(error)}
        end["trace"] = "".join(traceback.format_exception(error))[-3000:]
    finally:
        _folder = None
    if _broken:
        end = {"end": "finding", "what": f"forbidden: {_broken[0]}", "at": "audit"}
    grown = _peak() - before
    if end["end"] != "finding" and grown > 1 << 29:
        end = {"end": "finding", "what": f"took {grown >> 20} MiB", "at": "memory"}
    return {**end, "seconds": round(time.monotonic() - began, 3)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    faulthandler.enable()
    from readers import READERS

    for name in sys.argv[1].split(","):
        READERS[name].prepare()
    # Threads that libraries start take addresses of their own; let them.
    threading.Thread(target=lambda: None).start()
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_watch)
    print(json.dumps({"end": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        name, folder = line.rstrip("\n").split("\t")
        print(json.dumps(run(READERS[name], Path(folder))), file=answers, flush=True)


if __name__ == "__main__":
    main()
