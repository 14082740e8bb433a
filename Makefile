# Every target does its own set-up, once: a virtual environment in .venv, made again when
# pyproject.toml changes. Pass options with ARGS:  make serve ARGS="--port 9000"
VENV ?= .venv
ARGS ?=
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
bin := $(VENV)/bin
aot_rows := .cache/aot-rows.jsonl
pip := $(bin)/python -m pip --disable-pip-version-check

.PHONY: help serve test check format bench bench-peers bench-startup soak aot aot-all clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

serve: $(VENV)/.installed ## serve the embedded default model on port 8000
	$(bin)/octavo serve $(ARGS)

test: $(VENV)/.installed-test ## run the tests
	$(bin)/python -m pytest $(if $(ARGS),$(ARGS),-q -m "not slow and not aot" --timeout 600 $(PARALLEL) --durations=20)

check: $(VENV)/.installed-test ## formatting, lint and types
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/pyright --pythonpath $(bin)/python

format: $(VENV)/.installed-test ## rewrite the files as `make check` wants them
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

bench: $(VENV)/.installed ## tokens/s, TTFT, TPOT and ITL of the default model at 1, 4 and 16 streams
	$(bin)/octavo bench serve --result-dir benchmarks/results $(ARGS)

bench-peers: $(VENV)/.installed-bench .venv-peers/.installed ## the same next to llama.cpp and OpenVINO GenAI
	$(bin)/python -m benchmarks.peers $(ARGS)

bench-startup: $(VENV)/.installed ## seconds from process start to ready, cold and warm
	$(bin)/octavo bench startup --result-dir benchmarks/results $(ARGS)

soak: $(VENV)/.installed ## an hour of mixed requests on a server whose model costs nothing
	$(bin)/python -m benchmarks.soak $(if $(ARGS),$(ARGS),--seconds 3600)

# In an environment of its own: two gigabytes of compilers that serving on a CPU must not load.
aot: ## compile the step programs for one TPU and one GPU, with neither at hand
	$(MAKE) VENV=.venv-aot .venv-aot/.installed-aot
	.venv-aot/bin/python -m pytest -q -m "aot and not slow" $(subst loadfile,worksteal,$(PARALLEL)) --durations=10 $(ARGS)

aot-all: ## the same for every shape and chip that the tests know (hours on two cores); writes docs/aot.md
	$(MAKE) VENV=.venv-aot .venv-aot/.installed-aot
	$(if $(ARGS),,rm -f $(aot_rows)) # with ARGS, say one file, the other rows stay
	.venv-aot/bin/python -m pytest -q -p tests.pallas_kernels.aot_rows -m aot --aot-rows $(aot_rows) $(ARGS); \
	    status=$$?; .venv-aot/bin/python -m benchmarks.aot_table $(aot_rows) docs/aot.md && exit $$status

clean: ## remove the environment and what tests and tools left
	rm -rf $(VENV) .venv-* .pytest_cache .ruff_cache .hypothesis

# An installation builds the CPU kernels where these are newer than the library (pallas_kernels/native/build.py).
sources := pyproject.toml hatch_build.py $(wildcard pallas_kernels/native/*.cc pallas_kernels/native/*.h) \
    pallas_kernels/native/build.py

$(VENV)/.installed: $(sources) | $(bin)/python
	$(pip) install --quiet -e .
	@touch $@

$(VENV)/.installed-%: $(sources) | $(bin)/python
	$(pip) install --quiet -e ".[$(if $(filter aot,$*),test$(comma)aot,$*)]"
	@touch $(VENV)/.installed $@

# Engines to compare with, in an environment of their own, as built for PyPI.
.venv-peers/.installed: | $(bin)/python
	$(bin)/python -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet --only-binary :all: openvino-genai
	@touch $@

$(bin)/python: scripts/find-python
	@if [ ! -x $(bin)/python ]; then \
	    python=$$(PYTHON="$(PYTHON)" scripts/find-python) || exit 1; \
	    echo "Setting up $(VENV) with $$python; this takes a minute or two, once."; \
	    "$$python" -m venv $(VENV) || exit 1; \
	fi

comma := ,
