"""Writes docs/licences.md: every package of the lock with its licence, as the installed packages say.

make audit
"""

import importlib.metadata
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_BINDING = re.compile(r"\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)
_KNOWN = re.compile(
    r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|MPL|Mozilla|Zlib|Unlicense|LGPL|Lesser|HPND|CC0|0BSD",
    re.IGNORECASE,
)


_IN_TEXT = re.compile(
    r"Apache License,? Version 2\.0|MIT License|Redistribution and use|Mozilla Public License"
)
# Said by the file LICENSE of their repositories, not by the packages.
_LOOKED_UP = {"sentencepiece": "Apache-2.0"}


def locked(lock: str) -> list[str]:
    """Names in a lock file."""
    lines = (line.split("#")[0].strip() for line in lock.splitlines())
    return sorted({re.split(r"[ =<>~!;\[]", line)[0].lower() for line in lines if line and line[0] != "-"})


def licence(distribution: importlib.metadata.Distribution) -> str:
    """The licence in a few words; "unknown" where the package does not say."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [
        c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License")
    ]
    said = ", ".join(c for c in classifiers if c != "OSI Approved")
    first = (metadata.get("License") or "").strip().splitlines()
    for name in metadata.get_all("License-File") or []:
        text = " ".join((distribution.read_text(f"licenses/{name}") or "").split())[:2000]
        first += [found.group(0) for found in _IN_TEXT.finditer(text)][:1]
    return said or (first[0].strip()[:60] if first else _LOOKED_UP.get(metadata["Name"], "unknown"))


def verdict(words: str) -> str:
    """What a licence asks of users: nothing to mark, or what to look at."""
    if _BINDING.search(words) and not re.search(r"Lesser|LGPL|exception", words, re.IGNORECASE):
        return "binds those who pass the whole on"
    return "" if _KNOWN.search(words) else "not known: look"


def table() -> tuple[str, list[str]]:
    """Markdown, and the packages that want a look."""
    rows, marked = [], []
    for name in locked((REPOSITORY / "requirements.lock").read_text()):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another Python or platform
        words = licence(found)
        note = verdict(words)
        rows.append(f"| {found.metadata['Name']} | {found.version} | {words} | {note} |")
        marked += [f"{found.metadata['Name']}: {words}"] if note else []
    return "\n".join(["| package | version | licence | |", "|---|---|---|---|", *rows]), marked


def main() -> None:
    """Writes the page; exit code 1 where a licence wants a look."""
    text, marked = table()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = (
        f"What `requirements.lock` installs for Python {python} on Linux, as the packages say themselves.\n"
    )
    page = f"# Licences\n\n{head}Renewed by `make audit`.\n\n{text}\n"
    (REPOSITORY / "docs/licences.md").write_text(page)
    print(*(marked or ["every licence is a permissive or weak one"]), sep="\n")
    sys.exit(bool(marked))


if __name__ == "__main__":
    main()
