# The AI radiologist. `make run` is all one needs; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/$(VENV)
export UV_COMPILE_BYTECODE := 1
export UV_PYTHON_DOWNLOADS := never
HOROVOD ?= 1
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH
export TF_CPP_MIN_LOG_LEVEL ?= 2
unexport PYTHONDONTWRITEBYTECODE  # or each process compiles chexlib anew

PROFILE ?= quick
DATA ?=
# As it was given, for the shell to read from its environment: a folder's name may have ' and $$.
override export DATA := $(value DATA)
RESUME ?=
# `--name 'value'` of a setting that was given, as it was given: a file's name may have ' and $$.
option = $(if $(value $1),--$2 '$(subst ','\'',$(value $1))')
OUT ?= course
override export OUT := $(value OUT)
COURSE ?=
override export COURSE := $(value COURSE)

.PHONY: help env run course test test-long check faults fuzz peer lab lint clean real-model has-data

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "Settings: DATA=DIR (NIH layout)  PROFILE=quick|standard|cluster  RESUME=1  OUT=DIR (of the course)  COURSE=DIR (for lab)  PYTHON=3.13  HOROVOD=0"
	@echo "Engines: ENGINES=N  THREADS=N  HOSTS=node1:2,node2:2|FILE INTERFACE=eth0  SLURM=1 INTERFACE=eth0 SLURM_OPTIONS='--time=02:00:00'"

env: $(STAMP)  ## make the environment in .venv

run: $(STAMP)  ## execute every notebook headless and write the report
	@exec $(BIN)/python -m chexlib run --profile $(PROFILE) $(if $(DATA),--data "$$DATA") $(if $(SLURM),--slurm) \
	  $(call option,ENGINES,engines) $(call option,THREADS,threads) $(call option,HOSTS,hosts) \
	  $(call option,INTERFACE,interface) $(call option,SLURM_OPTIONS,slurm-options) $(if $(RESUME),--resume)

course: $(STAMP)  ## write notebooks for students, and solved ones, to OUT=course
	@exec $(BIN)/python -m chexlib course "$$OUT"

# Two test processes, of a thread each (tests/conftest.py): first on files that start nothing, then on
# those that start ranks, engines or notebooks, the longest first.
TWO := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
TOGETHER := $(TWO) -m 'not cores'
COUNTED := --durations=20 --cov=chexlib

test: $(STAMP)  ## run the tests, with coverage of chexlib: 15 to 20 minutes on 2 cores
	@failed=0; \
	$(TOGETHER) $(COUNTED) --cov-report= || failed=1; \
	$(TWO) -m cores $(COUNTED) --cov-append --cov-report=term --cov-fail-under=90 || failed=1; \
	exit $$failed

test-long: export CHEXLIB_LONG := 1
test-long: test faults  ## run the tests, their long forms too, and 20 fault trials: an hour or two

check: $(STAMP)  ## run the tests of what the change since main touches: two minutes at most
	@$(BIN)/ruff check .
	@tests=$$($(BIN)/python tests/touched.py) || exit $$?; \
	[ -z "$$tests" ] || $(TOGETHER) -q --durations=5 --durations-min=1 $$tests || [ $$? = 5 ]

real-model: has-data $(STAMP)  ## train on the real radiographs in DATA=DIR or DIR:DIR, an hour
	@exec $(BIN)/python -m examples.real_model --data "$$DATA"

has-data:
	@[ -n "$$DATA" ] || { echo "Error: name the radiographs: make real-model DATA=DIR (or DIR:DIR)" >&2; exit 2; }

faults: $(STAMP)  ## kill, stall and damage 20 trainings; each must end well
	@exec $(BIN)/python tests/faults.py

fuzz: $(STAMP)  ## read 200,000 files made to break their readers, an hour or two; goes on where it was
	@exec nice $(BIN)/python tests/fuzz/long.py

peer:  ## make benchmarks/.torch, an environment with PyTorch to compare with
	python3 -m venv benchmarks/.torch
	benchmarks/.torch/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy

lint: $(STAMP)  ## check code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

lab: $(STAMP)  ## open JupyterLab on the notebooks, or on COURSE=course/student
	@exec $(BIN)/jupyter lab --notebook-dir "$${COURSE:-notebooks}" --KernelManager.transport_encryption=auto

clean:  ## end stray engines, remove the environment and all made data (runs/ stays)
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m chexlib clean || true; fi
	rm -rf $(VENV) benchmarks/.torch data/phantom data/cache .pytest_cache .ruff_cache .coverage*

# PYTHON is a program, or a version such as 3.13 that uv finds or fetches. Without a C++ compiler, or with HOROVOD=0,
# Horovod is left out, and the ranks communicate through mpi4py.
$(STAMP): pyproject.toml uv.lock $(wildcard horovod-headers/horovod_headers/*.py)
	@case "$${PYTHON:-}" in \
	3.1[1-3]) python=$$PYTHON; export UV_PYTHON_DOWNLOADS=automatic; \
	  command -v uv >/dev/null || { echo "Error: PYTHON=$$PYTHON needs uv, and uv was not found. Install it (pipx install uv), or name a program: make env PYTHON=/path/to/python3.13" >&2; exit 2; } ;; \
	*) python=$$(for p in "$${PYTHON:-}" python3 python3.13 python3.12 python3.11; do \
	    [ -n "$$p" ] && "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	      && { echo "$$p"; break; }; done; true); \
	  [ -n "$$python" ] || { echo "Error: Python 3.11, 3.12 or 3.13 is needed (found: $$(python3 --version 2>&1 || true)). Install one and name it (make env PYTHON=/path/to/python3.13), or let uv fetch one (pipx install uv, then make env PYTHON=3.13)" >&2; exit 2; }; \
	  if ! command -v uv >/dev/null; then \
	    "$$python" -c 'import ensurepip, venv' 2>/dev/null || { echo "Error: $$python cannot make environments. Install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }; \
	    [ -x $(BIN)/python ] || "$$python" -m venv $(VENV); \
	    echo "Fetching uv into $(VENV) ..."; $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'; \
	    python=$(BIN)/python; \
	  fi ;; \
	esac; \
	without=; said=", Horovod is compiled"; \
	if [ "$$(uname -sm)" != "Linux x86_64" ] || [ "$(HOROVOD)" = 0 ]; then without="--no-install-package horovod"; said=; \
	elif ! command -v "$${CXX:-g++}" >/dev/null; then without="--no-install-package horovod"; said=; \
	  echo "No C++ compiler ($${CXX:-g++}): Horovod is left out, and the ranks communicate through mpi4py. To have Horovod later: apt install g++, rm $(STAMP), make env"; fi; \
	echo "Making the environment in $(VENV): a few minutes$$said ..."; \
	uv sync --locked --quiet --python "$$python" $$without \
	  || { echo "Error: the environment could not be made: uv says why above. If Horovod did not compile, make env HOROVOD=0 leaves it out, and the ranks communicate through mpi4py." >&2; exit 2; }; \
	touch $@
