"""A short form of `make fuzz`: fixed seeds, few executions, nothing may be found."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import fuzz, mutated
from readers import READERS


@pytest.mark.parametrize("name", READERS)
def test_what_is_not_as_it_should_be_is_refused_in_one_line(name, tmp_path):
    done, refused, findings = fuzz(name, tmp_path, seed=0, seconds=60, most=150)
    assert not findings, findings[:3]
    assert done > 20
    assert refused or name == "records"


def test_changes_change_and_repeat():
    data = b'{"a": [1, 2, {"b": "c"}]}' * 3
    changed = [mutated(data, b"xyz", np.random.default_rng(i)) for i in range(50)]
    assert changed == [mutated(data, b"xyz", np.random.default_rng(i)) for i in range(50)]
    assert sum(one != data for one in changed) > 40
