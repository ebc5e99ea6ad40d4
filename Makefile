# `make install` creates the environment in .venv and changes nothing else; every target that runs Python depends on it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help install extras train submit test test-quick test-all coverage fuzz torture preemptions hangs soak lint check clean

VENV ?= .venv
CONFIG ?= configs/quickstart.yaml
ARGS ?=
ADDRESS ?= http://127.0.0.1:8265
N ?=
PYTHON ?= python3 python3.13 python3.12 python3.11
TORCH_INDEX ?=

RUN := "$(VENV)/bin/python"
# Use only the project's own settings and conftest.py, even if the checkout contains others.
PYTEST := $(RUN) -m pytest -c pyproject.toml --confcutdir tests
IN_TWO_PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder  # the tests of a file share a Ray head; ARGS="-n 0" runs all in one process
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Recipes read these from the environment, because a space, a quote or a $ in them would change the command.
export config_file := $(value CONFIG)
export dashboard := $(value ADDRESS)

ifeq ($(filter oneshell,$(.FEATURES)),)
$(error GNU make $(MAKE_VERSION) is too old, 3.82 is needed; on macOS: `brew install make`, then gmake instead of make)
endif
ifneq ($(word 2,$(VENV)),)
$(error VENV=$(VENV): make cannot handle spaces in this path; choose another folder)
endif

help:
	@cat <<'END'
	make install      create the environment in $(VENV); changes nothing else
	make extras       also install the optional packages that only some tests need (requirements-extras.txt)
	make train        train with $(CONFIG), or resume the run
	make submit       the same as a Ray job on the cluster at ADDRESS
	make test         run the checks and all tests except those of rare faults (15 to 20 minutes on 2 cores)
	make test-quick   run the fast tests, which do not start Ray
	make test-all     install the extras and run all tests, fuzz, torture, hangs and soak (about 2 hours)
	make fuzz         read N=10000 invalid inputs per reader; each must give a clear error and lose nothing
	make torture      interrupt runs N=100 times in 7 ways (SEED=0); each must have the result of an uninterrupted run
	make preemptions  preempt three runs four times each, with and without notice; prints what it costs
	make hangs        make N=50 processes hang in a run; each must be resolved or end with a clear error
	make soak         run 80,000 tiny steps; memory, open files and step time must stay constant
	make lint         check format, lint, types and spelling, and build the documentation
	make check        the same, and test layers and documentation (less than a minute)
	make docs         regenerate the reference pages and build the documentation as site/index.html
	make coverage     measure the line coverage of the fast tests; writes htmlcov/index.html
	make clean        remove the environment; keeps data and checkpoints

	ARGS="--training.max_steps 100"   arguments of the command
	CONFIG=configs/savant.yaml        settings file
	ADDRESS=http://head:8265          dashboard of the cluster, for make submit
	PYTHON=python3.12                 Python for the environment (3.11 to 3.13)
	TORCH_INDEX=…                     package index for torch (docs/guides/gpu.md)
	END

install: $(STAMP)
	@:

extras: install
	@$(RUN) -m pip install --quiet -r requirements.txt -r requirements-extras.txt

train: install
	@exec $(RUN) jobs/train.py --config "$$config_file" $(ARGS)

submit: install
	@$(RUN) -m savant_ray.cluster.upload jobs/runtime_env.yaml
	exec "$(VENV)/bin/ray" job submit --address "$$dashboard" --working-dir . --runtime-env jobs/runtime_env.yaml \
	    -- python jobs/train.py --config "$$config_file" $(ARGS)

# Tests start hundreds of Python processes, which would all compile the package if this variable is set.
test test-quick test-all coverage: export PYTHONDONTWRITEBYTECODE :=

test: lint  # the tests of `make check` are among these
	@exec $(PYTEST) -m "not rare" $(IN_TWO_PROCESSES) $(ARGS)

test-quick: install
	@exec $(PYTEST) -m "not slow" $(IN_TWO_PROCESSES) $(ARGS)

test-all: lint extras
	@$(PYTEST) $(ARGS)
	$(MAKE) fuzz torture hangs soak

fuzz: install
	@exec $(RUN) -m tests.fuzz "$(or $(N),10000)"

torture: install
	@exec $(RUN) -m tests.torture "$(or $(N),100)" "$(or $(SEED),0)"

preemptions: install
	@exec $(RUN) -m tests.torture.preemptions $(ARGS)

hangs: install
	@exec $(RUN) -m tests.torture.hangs "$(or $(N),50)"

soak: install
	@exec $(RUN) -m tests.torture.soak

lint: install
	@tracked() { $(RUN) -P tests/tracked_files.py "$$@"; }
	tool() { xargs -0 $(RUN) -P -m "$$@"; }  # -P: a stray module in the current folder is not imported
	tracked '*.py' '*.ipynb' | tool ruff format --config pyproject.toml --check
	tracked '*.py' '*.ipynb' | tool ruff check --config pyproject.toml
	tracked 'savant_ray/*.py' 'jobs/*.py' 'docs/*.py' | tool mypy --config-file pyproject.toml
	tracked '*' | tool codespell_lib
	$(BUILD_SITE)

check: lint
	@exec $(PYTEST) -m "not slow" tests/test_layers.py tests/test_docs.py tests/test_reliability.py tests/test_packaging.py

# Broken links and anchors, and pages that are missing in the navigation, are errors; with --quiet they would not be.
BUILD_SITE = NO_MKDOCS_2_WARNING=1 $(RUN) -P -m mkdocs build --strict --config-file mkdocs.yml

.PHONY: docs
docs: install
	@$(RUN) -m docs.generate
	$(BUILD_SITE)
	echo "site/index.html is written; open it in a browser (with search: python3 -m http.server --directory site)"

coverage: install
	@exec $(PYTEST) -m "not slow" --cov --cov-report=term --cov-report=html $(ARGS)

clean:
	rm -rf "$(VENV)"

$(STAMP): requirements.txt pyproject.toml
	@$(find_python)
	if ! $(RUN) -m pip --version >/dev/null 2>&1; then
	    echo "Creating $(VENV) with $$("$$python" --version) …"
	    "$$python" -m venv --clear "$(VENV)"
	fi
	echo "Installing requirements.txt into $(VENV) …"
	$(install_torch)
	$(RUN) -m pip install -r requirements.txt
	$(RUN) -m pip install --no-build-isolation --no-deps -e .
	touch "$(STAMP)"

# Sets $python to the first candidate of a supported version that can create environments.
define find_python
python= ; without_venv=
for candidate in $(PYTHON); do
    "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || continue
    if "$$candidate" -c 'import venv, ensurepip' 2>/dev/null; then python="$$candidate"; break; fi
    without_venv="$$candidate"
done
if [ -z "$$python" ] && [ -n "$$without_venv" ]; then
    echo "$$without_venv cannot create environments: sudo apt install python3-venv" >&2; exit 1
elif [ -z "$$python" ]; then
    echo "No Python 3.11, 3.12 or 3.13 among: $(PYTHON). Install one (sudo apt install python3 python3-venv)" >&2
    echo "or name yours: make install PYTHON=/path/to/python3" >&2; exit 1
fi
endef

# The default wheel of many package indexes is the CUDA build, with gigabytes of CUDA packages. Without an NVIDIA GPU the
# CPU build is installed; a torch of the right version that is installed already is kept.
define install_torch
torch_is_there() {
    $(RUN) -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' \
        $(TORCH) 2>/dev/null
}
brings_cuda() {
    report=$$($(RUN) -m pip install --dry-run --quiet --report - torch==$(TORCH) 2>/dev/null) &&
        grep -qE '"name": ?"(nvidia|cuda|triton)' <<<"$$report"
}
if torch_is_there; then
    :
elif [ -n "$(TORCH_INDEX)" ]; then
    $(RUN) -m pip install --index-url "$(TORCH_INDEX)" torch==$(TORCH)
elif nvidia-smi >/dev/null 2>&1 || $(RUN) -m pip install torch==$(TORCH)+cpu 2>/dev/null; then
    :
elif brings_cuda; then
    cat >&2 <<'END'

	This machine has no NVIDIA GPU, and its package index has only the CUDA build of torch (several gigabytes).
	To install the CPU build: on pytorch.org, "Get Started", choose Pip and CPU; the command shown there ends in
	--index-url and an address. Then run, with that address,

	    make $(or $(MAKECMDGOALS),install) TORCH_INDEX=ADDRESS

	END
    exit 1
fi
endef
