# Two commands: `make demo` and `make test`. Each makes .venv when it is not there, or when what it holds
# is out of date, and is quick otherwise.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := plugins/math_ref plugins/flash_triton plugins/efficient_cuda plugins/adapters
PROJECTS := pyproject.toml $(PLUGINS:%=%/pyproject.toml)
# Of most that is installed nothing is ever imported; bytecode of the rest is kept, whatever the environment says, as
# hundreds of processes would compile the same modules again.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE :=
EDITABLE := --editable . $(PLUGINS:%=--editable %)
# PYTHONS: in an empty environment of each of these `make dist` tries what was built; `make releases` runs tests with each.
PYTHONS ?= $(PYTHON)
# Installs these distributions into a folder beside what a Python has, from here alone.
install_beside = $(1) -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target $(2) . $(PLUGINS)

.DEFAULT_GOAL := help
.PHONY: help demo test releases lint gpu bench docs dist clean

help:  ## show what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

demo: $(VENV)/demo  ## real models: a semantic search once with each implementation, and a small Llama tuned
	$(BIN)/python examples/semantic_search.py
	$(BIN)/python examples/small_llama.py

# In random order. A run prints its seed, and `--randomly-seed=SEED` repeats it. SLOW=yes adds what takes long: each shipped
# configuration compiled, kernels emulated, packages installed.
test: $(VENV)/dev  ## the tests, but for those that need a GPU or take long; SLOW=yes for those that take long, too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 --durations-min=2 \
		$(if $(SLOW),,-m "not slow")

# Dynamo of an old release cannot trace all that the pinned one's can, and mostly types and values decide that: nothing but
# a trace with it shows what. Each of PYTHONS has torch, what attnplug requires, setuptools, pytest and hypothesis.
COMPILED := tests/dispatch/test_compile.py tests/dispatch/test_tracers.py tests/tuning/test_in_graphs.py
releases:  ## compiled calls with the torch of each of PYTHONS: the oldest release and the newest, 3 minutes each
	failed=; for python in $(PYTHONS); do \
		$(call install_beside,$$python,build/releases) && \
		$$python -c 'import torch; print("PyTorch", torch.__version__, flush=True)' && \
		PYTHONPATH="$(CURDIR)/build/releases$${PYTHONPATH:+:$$PYTHONPATH}" OMP_NUM_THREADS=1 \
			$$python -m pytest -m "not slow" $(or $(TESTS),$(COMPILED)) || failed="$$failed $$python"; \
	done; test -z "$$failed" || { echo "failed with:$$failed" >&2; exit 1; }

lint: $(VENV)/dev  ## formatting, types, and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A machine with a GPU may have no network: this is installed beside the Python that has torch, from here alone, and from
# a folder of wheels: what that Python lacks, with all that it requires (`pip download importlib-metadata platformdirs`),
# pytest-xdist, without which the tests run one after the other, ptxas 13.1 (nvidia-cuda-nvcc), and peers.
SITE := build/gpu
gpu:  ## everything that needs a GPU, with the Python that has torch, in under 8 minutes; PART=conformance for one part
	$(call install_beside,$(PYTHON),$(SITE)) $(if $(WHEELS),$(wildcard $(WHEELS)/*.whl))
	PYTHONPATH="$(CURDIR)/$(SITE)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) benchmarks/gpu.py \
		$(PART:%=--part %) $(OUT:%=--results '%')

bench: $(VENV)/dev  ## what the core costs, against what a user would call instead
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/dev  ## the documentation, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# TORCH: a version, or newest.
dist: $(VENV)/bin/python  ## wheels and source distributions of everything, in dist, checked and tried
	$(INSTALL) --requirement requirements-dist.txt
	$(BIN)/python .ci/dist.py build
	for python in $(PYTHONS); do \
		$(BIN)/python .ci/dist.py try $$python --torch "$(TORCH)" --cpu-index "$(CPU_INDEX)" || exit; done

clean:  ## take the environment away
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: it is what everything else must agree with. With it comes what builds our five packages, which pip
# would else install for each of them.
$(VENV)/demo: $(VENV)/bin/python constraints.txt requirements-demo.txt $(PROJECTS)
	$(INSTALL) torch 'setuptools>=77'
	$(INSTALL) --no-build-isolation $(EDITABLE)
	$(INSTALL) --requirement requirements-demo.txt
	touch $@

$(VENV)/dev: $(VENV)/demo requirements-dev.txt
	$(INSTALL) --requirement requirements-dev.txt
	touch $@
