"""The launch scripts, as far as a machine without a cluster shows: what they print is what they run.

Programs of a cluster are stubs that record how they were called. They and the plain tools below are
all that is on PATH, so no test can reach a real cluster.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RECIPE = "gin_configs/recipes/demo.gin"
TOOLS = ["bash", "cat", "date", "dirname", "env", "id", "seq", "sleep"]
STUBS = ["docker", "mkdir", "python", "sbatch", "scontrol", "tar", "xpk"]

# What any shell or quoting error would change.
NASTY = """corpus.source = "it's $HOME `date` \\\\ !x *  \\"two\\" ü; exit 7" """

# Flags that are enough for each script.
EXAMPLES = {
    "tpu_vm.sh": "--name=memory --type=v5p-64 --zone=us-east5-a --workdir=gs://bucket/run --poll-seconds=0",
    "gke_xpk.sh": "--cluster=pods --name=memory --type=v5litepod-256 --image=host/image:tpu --workdir=gs://bucket/run",
    "slurm.sh": "--workdir=/shared/run --python=python",
    "local.sh": "--workdir=run --python=python",
    "docker.sh": "--device=cuda13 --workdir=/data/run",
}
SOURCED = {"commands.sh"}  # by the scripts above
SUBMITTED = {"slurm_job.sh"}  # by slurm.sh; has tests of its own
ALL = sorted(path.name for path in LAUNCH.glob("*.sh"))

RECORD = r"""#!/usr/bin/env bash
record() { local call; printf -v call '%s\x1f' "$@"; printf '%s\x1e' "$call" >>"$RECORD"; }
"""
# Says that there is no queued resource until one was created, then the states in $STATES, and runs no job.
GCLOUD = """record gcloud "$@"
case "$*" in
  *" describe "*)
    if [[ -s $STATES ]]; then
      mapfile -t states <"$STATES"
      echo "${states[0]}"
      printf '%s\\n' "${states[@]:1}" >"$STATES"
      ((${#states[@]} > 1)) || : >"$STATES"
      exit
    fi
    [[ $(<"$RECORD") == *$'\\x1f'create$'\\x1f'* ]] && echo ACTIVE || exit 1 ;;
  *"exec .venv/bin/python"*) exit "${JOB_CODE:-0}" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """Runs words on a machine whose PATH holds stubs and plain tools; `.calls()` is what stubs were told."""
    machine = Machine(tmp_path)
    yield machine
    for process in machine.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Machine:
    def __init__(self, folder: Path):
        self.folder = folder
        self.record = folder / "record"
        self.states = folder / "states"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.started = []
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in STUBS:
            self.stub(name, f'record {name} "$@"\n')
        self.stub("gcloud", GCLOUD)
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "RECORD": str(self.record),
            "STATES": str(self.states),
        }

    def stub(self, name: str, body: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(RECORD + body)
        path.chmod(0o755)

    def start(self, *words: object, **environment: str) -> subprocess.Popen:
        # Where tests run in several workers, these are deaf to Ctrl-C, and would hand that on.
        hearing = ["/usr/bin/env", "--default-signal=INT"]
        process = subprocess.Popen(
            [*hearing, *(str(word) for word in words)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *words: object, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def launch(self, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        return self.run(LAUNCH / script, *shlex.split(EXAMPLES[script]), *flags, **environment)

    def calls(self) -> list[list[str]]:
        """The words of each call of a stub since the last time this was asked, in order."""
        text = self.record.read_text() if self.record.exists() else ""
        self.record.unlink(missing_ok=True)
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]


def test_every_script_is_tested():
    assert {*EXAMPLES, *SOURCED, *SUBMITTED} == set(ALL)


@pytest.mark.parametrize("script", ALL)
def test_bash_can_read_it(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script], check=False).returncode == 0


@pytest.mark.parametrize("script", sorted({*ALL} - SOURCED))
def test_it_stops_at_the_first_error(script):
    lines = [line for line in (LAUNCH / script).read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "set -euo pipefail"
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_help_has_an_example_and_every_flag(script, machine):
    result = machine.run(LAUNCH / script, "--help")
    assert result.returncode == 0
    assert f"launch/{script} --" in result.stdout
    own = re.search(r'^parse "(.*)" "(.*)" "\$@"$', (LAUNCH / script).read_text(), re.MULTILINE)
    flags = f"{own[1]} {own[2]} workdir gin_file gin stage dry_run help".split()
    assert len(flags) > 8
    for flag in flags:
        assert re.search(rf"^  (.*  )?--{flag.replace('_', '-')}\b", result.stdout, re.MULTILINE), flag


def test_help_of_the_submitted_script_names_the_one_to_use(machine):
    result = machine.run(LAUNCH / "slurm_job.sh", "--help")
    assert (result.returncode, "launch/slurm.sh" in result.stdout) == (0, True)


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_the_examples_of_the_help_are_accepted(script, machine):
    machine.folder = ROOT  # where they are given
    text = machine.run(LAUNCH / script, "--help").stdout.replace("\\\n", " ")
    examples = re.findall(r"^  (launch/\w+\.sh .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        result = machine.run(*shlex.split(example), "--dry-run")
        assert (result.returncode, result.stderr) == (0, ""), example
    assert machine.calls() == []


def test_the_examples_of_the_guide_are_accepted(machine):
    machine.folder = ROOT
    examples = re.findall(r"`(launch/\w+\.sh --.*?)`", (ROOT / "docs" / "guide.md").read_text())
    assert {example.split()[0] for example in examples} == {f"launch/{script}" for script in EXAMPLES}
    for example in examples:
        result = machine.run(*shlex.split(example.replace("RECIPE", RECIPE)), "--dry-run")
        assert (result.returncode, result.stderr) == (0, ""), example


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_a_dry_run_runs_nothing(script, machine):
    result = machine.launch(script, "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout
    assert machine.calls() == []


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_a_dry_run_needs_no_cluster(script, machine):
    for name in [*STUBS, "gcloud"]:
        (machine.bin / name).unlink()
    assert machine.launch(script, "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("tpu_vm.sh", "gcloud"),
        ("gke_xpk.sh", "xpk"),
        ("slurm.sh", "sbatch"),
        ("slurm.sh", "python"),
        ("local.sh", "python"),
        ("docker.sh", "docker"),
    ],
)
def test_a_missing_program_is_told_first(script, program, machine):
    (machine.bin / program).unlink()
    result = machine.launch(script)
    assert result.returncode == 2
    assert re.fullmatch(rf"error: {program} was not found: \w.*\n", result.stderr)
    assert machine.calls() == []


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_what_is_printed_is_what_is_run(script, machine):
    flags = [f"--gin={NASTY}", "--gin-file", RECIPE, "--", "--from=a 'b' c"]
    if script in ("slurm.sh", "local.sh"):  # recipes are looked up where the command is given
        flags[2] = str(ROOT / RECIPE)
    if script != "local.sh":
        flags = [f"--pass=--note={NASTY}", *flags]
    printed = machine.launch(script, "--dry-run", *flags)
    assert (printed.returncode, machine.calls()) == (0, [])
    real = machine.launch(script, *flags)
    assert real.returncode == 0, real.stderr
    calls = machine.calls()
    pasted = machine.run("bash", "-c", printed.stdout)
    assert pasted.returncode == 0, pasted.stderr
    assert machine.calls() == calls != []
    assert any(NASTY in word for call in calls for word in call)


def test_the_commands_a_tpu_vm_is_given(machine):
    flags = ["--project=mine", "--spot", "--delete", f"--gin-file={RECIPE}", "--dry-run"]
    lines = machine.launch("tpu_vm.sh", *flags).stdout.splitlines()
    where = "--zone=us-east5-a --project=mine"
    look = f"gcloud compute tpus queued-resources describe memory {where} '--format=value(state.state)'"
    archive = f"{machine.folder}/mlp_memory-memory.tar.gz"
    assert lines[:6] == [
        look,
        "gcloud compute tpus queued-resources create memory --node-id=memory --accelerator-type=v5p-64 "
        f"--runtime-version=v2-alpha-tpuv5 {where} --spot",
        "# every 0 s, for 120 minutes at most, until it says ACTIVE:",
        look,
        f"tar --create --gzip --file={archive} --directory={ROOT} --exclude-vcs '--exclude=./.venv*' "
        "--exclude=./runs --exclude=__pycache__ .",
        f"gcloud compute tpus tpu-vm scp {archive} memory:mlp_memory.tar.gz {where} --worker=all",
    ]
    assert lines[6].startswith(f"gcloud compute tpus tpu-vm ssh memory {where} --worker=all '--command=")
    assert "--requirement=requirements.lock '\\''jax[tpu]'\\''" in lines[6]
    assert lines[7:] == [
        f"gcloud compute tpus tpu-vm ssh memory {where} --worker=all '--command=cd mlp_memory && exec "
        f".venv/bin/python -m mlp_memory run --workdir=gs://bucket/run --gin_file={RECIPE}'",
        f"gcloud compute tpus queued-resources delete memory {where} --force --quiet",
    ]


def test_a_workload_of_xpk(machine):
    flags = ["--slices=2", "--zone=us-west4-a", f"--gin-file={RECIPE}", "--dry-run", "--stage=distill"]
    place = "--tpu-type=v5litepod-256 --num-slices=2 --zone=us-west4-a"
    workload = (
        f"xpk workload create --cluster=pods --workload=memory {place} --docker-image=host/image:tpu "
        "--max-restarts=10 --restart-on-exit-codes=1 --termination-grace-period-seconds=120 "
        "'--command=exec python -m mlp_memory distill --workdir=gs://bucket/run "
        f"--gin_file={RECIPE}'\n"
    )
    assert machine.launch("gke_xpk.sh", *flags).stdout == workload
    cluster = f"xpk cluster create --cluster=pods {place}"
    for flag, capacity in (
        ((), "--on-demand"),
        (("--spot",), "--spot"),
        (("--reservation=r",), "--reservation=r"),
    ):
        made = machine.launch("gke_xpk.sh", *flags, "--create-cluster", *flag).stdout
        assert made == f"{cluster} {capacity}\n{workload}"


def test_a_job_of_slurm(machine):
    flags = ["--nodes=8", "--gpus-per-node=4", "--time=2:00:00", "--pass=--partition=h100", "--dry-run"]
    assert machine.launch("slurm.sh", *flags).stdout == (
        "sbatch --job-name=mlp-memory --nodes=8 --ntasks-per-node=4 --gpus-per-node=4 --time=2:00:00 "
        "--requeue --signal=B:USR1@120 --output=%x-%j.log --open-mode=append --partition=h100 "
        f"{LAUNCH}/slurm_job.sh python -m mlp_memory run --workdir=/shared/run\n"
    )


def test_processes_of_one_machine(machine):
    job = "python -m mlp_memory run --workdir=run &"
    met = "env MLP_MEMORY_COORDINATOR=localhost:29400 MLP_MEMORY_PROCESSES=2"
    assert machine.launch("local.sh", "--dry-run").stdout.splitlines() == [f"env {job}", "wait"]
    assert machine.launch("local.sh", "--processes=2", "--gpus=8", "--dry-run").stdout.splitlines() == [
        f"{met} MLP_MEMORY_PROCESS=0 CUDA_VISIBLE_DEVICES=0,1,2,3 {job}",
        f"{met} MLP_MEMORY_PROCESS=1 CUDA_VISIBLE_DEVICES=4,5,6,7 {job}",
        "wait",
    ]
    assert machine.launch(
        "local.sh", "--processes=2", "--cpu-devices=4", "--dry-run"
    ).stdout.splitlines() == [
        f"{met} MLP_MEMORY_PROCESS=0 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 {job}",
        f"{met} MLP_MEMORY_PROCESS=1 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 {job}",
        "wait",
    ]


def test_the_variables_of_a_process_are_those_the_package_reads():
    given = set(re.findall(r"MLP_MEMORY_[A-Z]+", (LAUNCH / "local.sh").read_text()))
    source = "".join(path.read_text() for path in (ROOT / "mlp_memory" / "parallel").glob("*.py"))
    assert given == set(re.findall(r"MLP_MEMORY_[A-Z]+", source))


def test_containers(machine):
    def dry_run(*flags):
        return machine.run(LAUNCH / "docker.sh", *flags, "--dry-run").stdout.splitlines()

    build = f"docker build --file={LAUNCH}/Dockerfile --build-arg=DEVICE="
    owner = f"--user={os.getuid()}:{os.getgid()} --env=HOME=/tmp"
    start = "docker run --rm --init --stop-timeout=120"
    assert dry_run("--device=cuda13", "--workdir=my run", f"--gin-file={RECIPE}") == [
        f"{build}cuda13 --tag=mlp-memory:cuda13 {ROOT}",
        "mkdir -p 'my run'",
        f"{start} --gpus=all --ipc=host {owner} '--volume={machine.folder}/my run:/workdir' "
        f"mlp-memory:cuda13 run --workdir=/workdir --gin_file={RECIPE}",
    ]
    assert dry_run("--device=cpu", "--workdir=/data")[-1] == (
        f"{start} {owner} --volume=/data:/workdir mlp-memory:cpu run --workdir=/workdir"
    )
    assert dry_run("--device=tpu", "--workdir=gs://bucket/run")[-1] == (
        f"{start} --privileged --network=host mlp-memory:tpu run --workdir=gs://bucket/run"
    )
    assert dry_run("--device=tpu", "--image=host/image:tpu", "--push") == [
        f"{build}tpu --tag=host/image:tpu {ROOT}",
        "docker push host/image:tpu",
    ]


def test_the_image_is_made_of_files_that_are_here():
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert {"requirements.lock", "mlp_memory", "gin_configs"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        *(
            (script, ["--work=x"], f"--work: there is no such flag: see {LAUNCH / script} --help")
            for script in EXAMPLES
        ),
        *((script, ["x"], f"x: a flag was expected: see {LAUNCH / script} --help") for script in EXAMPLES),
        *((script, ["--workdir"], "--workdir needs a value") for script in EXAMPLES),
        *((script, ["--workdir="], "--workdir needs a value") for script in EXAMPLES),
        *((script, ["--dry-run=1"], "--dry-run takes no value") for script in EXAMPLES),
        ("tpu_vm.sh", ["--workdir=/x"], "--workdir=/x: give gs://BUCKET/FOLDER, which all machines see"),
        (
            "gke_xpk.sh",
            ["--workdir=s3://x"],
            "--workdir=s3://x: give gs://BUCKET/FOLDER, which all machines see",
        ),
        (
            "tpu_vm.sh",
            ["--type=h100-8"],
            "--type=h100-8 is not known: give v5p-64, v5litepod-256, v6e-16 or v4-32, "
            "or --runtime-version too",
        ),
        ("tpu_vm.sh", ["--spot", "--reserved"], "--spot and --reserved exclude each other"),
        ("tpu_vm.sh", ["--wait-minutes=0"], "--wait-minutes=0: give 1 or more"),
        ("tpu_vm.sh", ["--poll-seconds=soon"], "--poll-seconds=soon: give a whole number"),
        (
            "tpu_vm.sh",
            [f"--gin-file={ROOT / RECIPE}"],
            f"--gin-file={ROOT / RECIPE}: give a file of this checkout, as gin_configs/recipes/demo.gin",
        ),
        (
            "gke_xpk.sh",
            ["--name=My_Run"],
            "--name=My_Run: give lower case letters, digits and -, 40 at most, the first a letter",
        ),
        (
            "gke_xpk.sh",
            ["--type=h100-8"],
            "--type=h100-8: give a TPU type, as v5p-64; for GPUs see launch/slurm.sh",
        ),
        (
            "gke_xpk.sh",
            ["--spot"],
            "--spot and --reservation say what a cluster is made of: give --create-cluster too",
        ),
        (
            "gke_xpk.sh",
            ["--create-cluster", "--spot", "--reservation=r"],
            "--spot and --reservation exclude each other",
        ),
        ("slurm.sh", ["--nodes=two"], "--nodes=two: give a whole number"),
        ("slurm.sh", ["--gpus-per-node=08"], "--gpus-per-node=08: give a whole number"),
        ("slurm.sh", ["--gin-file=none.gin"], "--gin-file=none.gin: there is no such file"),
        (
            "local.sh",
            ["--processes=2"],
            "--processes=2: say what they share, --gpus=8, or give --cpu-devices=1 to each",
        ),
        ("local.sh", ["--processes=3", "--gpus=8"], "--gpus=8 does not divide over --processes=3"),
        ("local.sh", ["--gpus=1", "--cpu-devices=1"], "--gpus and --cpu-devices exclude each other"),
        (
            "local.sh",
            ["--pass=x"],
            "--pass: there is nothing to pass flags to here; flags of the stage go after --",
        ),
        ("docker.sh", ["--device=gpu"], "--device=gpu: give cpu, cuda12, cuda13 or tpu"),
        (
            "docker.sh",
            ["--gin-file=none.gin"],
            "--gin-file=none.gin: give a file of this checkout, as " + RECIPE,
        ),
    ],
)
def test_a_wrong_flag_ends_in_one_line(script, flags, message, machine):
    result = machine.launch(script, *flags)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
    assert machine.calls() == []


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_each_flag_that_must_be_given_is_asked_for(script, machine):
    optional = ("--python", "--poll-seconds")
    given = [flag for flag in shlex.split(EXAMPLES[script]) if not flag.startswith(optional)]
    for left_out in given:
        result = machine.run(LAUNCH / script, *(flag for flag in given if flag != left_out), "--dry-run")
        name = left_out.split("=")[0]
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"error: {name} is missing: see {LAUNCH / script} --help\n"


@pytest.mark.parametrize(("script", "python"), [("tpu_vm.sh", ".venv/bin/python"), ("gke_xpk.sh", "python")])
def test_the_words_of_a_job_reach_python_through_the_remote_shell(script, python, machine):
    machine.launch(script, f"--gin={NASTY}", f"--gin-file={RECIPE}")
    commands = [word for call in machine.calls() for word in call if word.startswith("--command=")]
    if script == "tpu_vm.sh":
        folder = machine.folder / "mlp_memory" / ".venv" / "bin"
        folder.mkdir(parents=True)
        shutil.copy(machine.bin / "python", folder / "python")
    assert machine.run("bash", "-c", commands[-1].removeprefix("--command=")).returncode == 0
    words = ["run", "--workdir=gs://bucket/run", f"--gin_file={RECIPE}", f"--gin={NASTY}"]
    assert machine.calls() == [["python", "-m", "mlp_memory", *words]]


def test_the_workers_of_a_slice_are_set_up(machine):
    """An earlier process is told to end once and waited for; then the code and its packages are installed."""
    machine.launch("tpu_vm.sh")
    setup, job = (
        word.removeprefix("--command=") for call in machine.calls() for word in call if "--command=" in word
    )
    for tool in ("mkdir", "mv"):
        (machine.bin / tool).unlink(missing_ok=True)
        (machine.bin / tool).symlink_to(shutil.which(tool))
    machine.stub("timeout", 'shift\nexec "$@"\n')
    machine.stub("python3", 'record python3 "$@"\n')
    machine.stub("pkill", 'record pkill "$@"\necho >"$HOME/old"\n')
    machine.stub("pgrep", 'record pgrep "$@"\n[[ -f $HOME/old ]] && mv "$HOME/old" "$HOME/gone"\n')
    assert machine.run("bash", "-c", setup.replace("sleep 5", "sleep 0")).returncode == 0
    calls = machine.calls()
    pattern = calls[0][-1]
    assert calls[:3] == [["pkill", "--full", pattern], *[["pgrep", "--full", pattern]] * 2]
    install = "python3 -m uv pip install --quiet --python=.venv/bin/python"
    assert [" ".join(call) for call in calls[3:]] == [
        "tar --extract --gzip --file=mlp_memory.tar.gz --directory=mlp_memory",
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --python=3.12 .venv",
        f"{install} --requirement=requirements.lock jax[tpu]",
        f"{install} --no-deps --no-build-isolation --editable=.",
    ]
    # It finds the job, however often Python started it afresh, and not the shell that looks for it.
    assert re.search(pattern, job)
    assert not re.search(pattern, setup)


def verbs(calls: list[list[str]]) -> list[str]:
    """What gcloud was asked for: describe, create, delete, scp, ssh; or another program's name."""
    return [call[4] if call[0] == "gcloud" else call[0] for call in calls]


def test_a_slice_that_is_there_is_used(machine):
    machine.states.write_text("ACTIVE\nACTIVE\n")
    assert machine.launch("tpu_vm.sh").returncode == 0
    assert verbs(machine.calls()) == ["describe", "describe", "tar", "scp", "ssh", "ssh"]


def test_a_slice_is_waited_for(machine):
    machine.states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    result = machine.launch("tpu_vm.sh")
    assert result.returncode == 0
    assert "memory is PROVISIONING" in result.stderr
    assert verbs(machine.calls()) == ["describe"] * 3 + ["tar", "scp", "ssh", "ssh"]


def test_a_slice_that_was_preempted_is_asked_for_anew(machine):
    machine.states.write_text("SUSPENDED\n")
    assert machine.launch("tpu_vm.sh").returncode == 0
    assert verbs(machine.calls()) == ["describe", "delete", "create", "describe", "tar", "scp", "ssh", "ssh"]


def test_a_request_that_fails_is_told(machine):
    machine.states.write_text("ACCEPTED\nPROVISIONING\nFAILED\n")
    result = machine.launch("tpu_vm.sh")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: memory is FAILED: gcloud compute tpus queued-resources describe memory --zone=us-east5-a "
        "says why; the same command asks again"
    )
    assert verbs(machine.calls()) == ["describe"] * 3


def test_waiting_has_an_end(machine):
    machine.states.write_text("ACCEPTED\n" * 1000)
    # The clock of bash is set on, in place of waiting for a minute.
    result = machine.run(
        "bash",
        "-c",
        f"SECONDS=0; sleep() {{ SECONDS=$((SECONDS + $1)); }}; source {LAUNCH}/tpu_vm.sh "
        "--name=memory --type=v5p-64 --zone=z --workdir=gs://bucket/run --wait-minutes=2 --poll-seconds=30",
        str(LAUNCH / "tpu_vm.sh"),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: memory is ACCEPTED after 2 minutes: the same command goes on waiting"
    )
    assert len(machine.calls()) == 6  # at first, and 30 s apart from 0 to 120 s


def test_the_slice_is_given_back_however_the_job_ends(machine):
    result = machine.launch("tpu_vm.sh", "--delete", JOB_CODE="3")
    assert result.returncode == 3
    assert verbs(machine.calls())[-2:] == ["ssh", "delete"]
    machine.states.write_text("FAILED\n" * 3)
    assert machine.launch("tpu_vm.sh", "--delete").returncode == 1
    assert verbs(machine.calls())[-1] == "delete"


# srun's stub: runs the command and hands no signal on; scancel's sends SIGTERM to what srun runs.
SRUN = """shift 2
"$@" & echo $! >"$HOME/task"
wait $!
"""
SCANCEL = """record scancel "$@"
kill -TERM "$(<"$HOME/task")"
"""
UNTIL_TERM = 'trap "exit {code}" TERM; echo >"$HOME/ready"; while true; do sleep 0.05; done'


def slurm_job(machine, command: str) -> subprocess.Popen:
    machine.stub("srun", SRUN)
    machine.stub("scancel", SCANCEL)
    return machine.start(LAUNCH / "slurm_job.sh", "bash", "-c", command, SLURM_JOB_ID="17")


def when_there(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (134, True), (0, False)])
def test_the_time_limit_saves_a_checkpoint_and_requeues_what_is_not_done(code, requeued, machine):
    job = slurm_job(machine, UNTIL_TERM.format(code=code))
    for name in ("task", "ready"):
        when_there(machine.folder / name)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=30)
    assert job.returncode == code, err
    requeue = [["scontrol", "requeue", "17"]] if requeued else []
    assert machine.calls() == [["scancel", "--signal=TERM", "17"], *requeue]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_that_ends_by_itself_is_not_requeued(code, machine):
    job = slurm_job(machine, f"exit {code}")
    job.communicate(timeout=30)
    assert (job.returncode, machine.calls()) == (code, [])


def test_a_job_that_is_cancelled_is_not_requeued(machine):
    job = slurm_job(machine, UNTIL_TERM.format(code=143))
    for name in ("task", "ready"):
        when_there(machine.folder / name)
    job.terminate()
    os.kill(int((machine.folder / "task").read_text()), signal.SIGTERM)
    job.communicate(timeout=30)
    assert (job.returncode, machine.calls()) == (-signal.SIGTERM, [])


# Process 0 works until it is ended; process 1 fails beside it in the first two starts.
FAILS_TWICE = """record "$MLP_MEMORY_PROCESS"
lines() { mapfile -t rows < <(cat "$HOME/$1"); echo "${#rows[@]}"; }
echo >>"$HOME/$MLP_MEMORY_PROCESS"
(($(lines "$MLP_MEMORY_PROCESS") < 3)) || exit 0
if [[ $MLP_MEMORY_PROCESS == 1 ]]; then
  until [[ -f $HOME/0 ]] && (($(lines 0) == $(lines 1))); do sleep 0.02; done
  exit 9
fi
"""


def test_processes_start_again_until_the_stage_is_done(machine):
    machine.stub("python", FAILS_TWICE + UNTIL_TERM.format(code=143))
    flags = ["--processes=2", "--cpu-devices=1", "--restarts=1"]
    result = machine.launch("local.sh", *flags)
    assert result.returncode == 9
    assert result.stderr.count("a process ended with exit code 9: start 2 of 2\n") == 1
    assert sorted(machine.calls()) == [["0"], ["0"], ["1"], ["1"]]
    result = machine.launch("local.sh", *flags)
    assert (result.returncode, sorted(machine.calls())) == (0, [["0"], ["1"]])


@pytest.mark.parametrize("code", [2, 130, 143])
def test_no_start_follows_an_error_of_the_user_or_a_stop(code, machine):
    machine.stub("python", f"record python\nexit {code}\n")
    assert machine.launch("local.sh", "--restarts=5").returncode == code
    assert machine.calls() == [["python"]]


def test_a_process_that_does_not_heed_sigterm_is_killed(machine):
    machine.stub(
        "python",
        "if [[ $MLP_MEMORY_PROCESS == 1 ]]; then until [[ -s $HOME/task ]]; do sleep 0.02; done; exit 9; fi\n"
        'trap "" TERM; echo $$ >"$HOME/task"; while true; do sleep 0.05; done\n',
    )
    result = machine.launch("local.sh", "--processes=2", "--cpu-devices=1", "--grace=1")
    assert result.returncode == 9
    with pytest.raises(ProcessLookupError):
        os.kill(int((machine.folder / "task").read_text()), 0)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_reaches_every_process_once_and_waits_for_its_checkpoint(sent, code, machine):
    # As in training, a second SIGTERM would end the process before the checkpoint is written.
    machine.stub(
        "python",
        'trap "trap - TERM; sleep 0.5; record saved; exit 143" TERM\n'
        'echo $$ >"$HOME/task$MLP_MEMORY_PROCESS"; while true; do sleep 0.05 & wait $!; done\n',
    )
    job = machine.start(
        LAUNCH / "local.sh",
        *shlex.split(EXAMPLES["local.sh"]),
        "--processes=2",
        "--cpu-devices=1",
        "--restarts=3",
    )
    for index in "01":
        when_there(machine.folder / f"task{index}")
    job.send_signal(sent)
    _, err = job.communicate(timeout=30)
    assert job.returncode == code
    assert err.endswith("stopped; the same command goes on from here\n")
    assert machine.calls() == [["saved"], ["saved"]]


def test_jax_joins_the_processes(machine):
    """Two real processes of two devices each, with a job in place of mlp_memory that adds over all four."""
    (machine.folder / "mlp_memory").mkdir()
    (machine.folder / "mlp_memory" / "__main__.py").write_text(
        "import json, os, sys, jax, jax.numpy as jnp\n"
        "names = ('COORDINATOR', 'PROCESSES', 'PROCESS')\n"
        "where, count, index = (os.environ['MLP_MEMORY_' + name] for name in names)\n"
        "jax.distributed.initialize(where, int(count), int(index))\n"
        "from jax.experimental import multihost_utils\n"
        "total = multihost_utils.process_allgather(jnp.int32(int(index) + 1)).sum()\n"
        "seen = [int(total), jax.device_count(), jax.local_device_count(), sys.argv[1:]]\n"
        "json.dump(seen, open(index, 'w'))\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [
        "--processes=2",
        "--cpu-devices=2",
        f"--port={port}",
        f"--python={sys.executable}",
        f"--gin={NASTY}",
    ]
    result = machine.run(LAUNCH / "local.sh", "--workdir=run", *flags)
    assert result.returncode == 0, result.stderr
    for index in "01":
        seen = json.loads((machine.folder / index).read_text())
        assert seen == [3, 4, 2, ["run", "--workdir=run", f"--gin={NASTY}"]]
