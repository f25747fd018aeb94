import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("compile_steps.py")


def test_the_compiled_step_holds_no_logits_of_all_tokens_and_sends_none():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    for figures in found:
        # A device's part of [rows, V]: rows over data x fsdp, V over tensor.
        assert figures["largest"] < figures["rows"] // 4 * figures["vocabulary"] // 2 // 4
    # What crosses the network grows with the rows and with V, but not with their product.
    few_small, few_large, many_small, many_large = (figures["collectives"] for figures in found[:4])
    assert few_small < few_large
    assert few_small < many_small
    assert many_large - many_small == few_large - few_small
