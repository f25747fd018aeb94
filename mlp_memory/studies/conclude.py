"""From finished variants to results.json and findings.json."""

from mlp_memory.artifacts import canonical_json
from mlp_memory.evaluation.sections import Findings
from mlp_memory.studies import ablations, overfitting, scaling
from mlp_memory.studies.results import text_claims, text_table
from mlp_memory.studies.study import Study

RESULTS, FINDINGS = "results.json", "findings.json"


def conclude(study: Study) -> str:
    """Writes both files of a study whose variants are all made, and returns what they say for a terminal."""
    own = {"scaling": scaling.conclude, "overfitting": overfitting.conclude}
    numbers, findings = own.get(study.name, ablations.conclude)(study)
    numbers |= {"schema": 1, "command": study.command}
    study.directory.write(RESULTS, canonical_json(numbers).encode())
    study.directory.write(FINDINGS, canonical_json(findings.to_json()).encode())
    return f"{_text(findings)}\n\nfindings: {study.directory}"


def _text(findings: Findings) -> str:
    tables = [text_table(table) for section in findings.sections for table in section.tables]
    return "\n\n".join([*tables, text_claims(findings.claims)])
