# Everything from here needs only python3 (3.11 or newer) and make: each target makes .venv and installs what it lacks.
#   make PYTHON=python3.12 demo     another interpreter
#   make VENV=/somewhere/else demo  another place for the environment

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1

.DEFAULT_GOAL := help
.PHONY: help demo test nightly lab bench notebooks workshop reproduce sweep compare peers pretrain phone studies lint format clean
.DELETE_ON_ERROR:

help: ## this list
	@echo "edgelab: make targets (each works as the first command on a fresh clone)"
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/.export ## compress the embedded MoE model to int8, int4 and a phone's size, evaluate, export, verify
	@$(BIN)/edgelab demo $(ARGS)

lab: $(VENV)/.lab-export ## open JupyterLab on the notebooks (localhost only)
	@mkdir -p $(VENV)/share/jupyter/lab/settings # no question about news: nothing is fetched
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' > $(VENV)/share/jupyter/lab/settings/overrides.json
	@$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=notebooks --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test: $(VENV)/.test-lab-export-bnb ## all tests, and the notebooks top to bottom (ARGS="-k name" chooses)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --durations=10 $(ARGS)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

nightly: $(VENV)/.test-lab-export-bnb-gguf-executorch-openvino-coreml $(VENV)-litert/.made ## the tests of the runtimes that `make test` leaves out (two gigabytes; llama.cpp is built: a quarter of an hour)
	@$(BIN)/python -m pytest tests/test_export_*.py tests/test_ladder.py --durations=10 $(ARGS)
	@$(VENV)-litert/bin/python -m pytest tests/test_export_litert.py -p no:cacheprovider $(ARGS)

bench: $(VENV)/.test-lab-export-bnb ## the benchmarks of tests/bench, on this machine
	@$(BIN)/python -m pytest tests/bench -o "python_files=bench_*.py" -o "python_functions=bench_*" --benchmark-only --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds $(ARGS)

notebooks: $(VENV)/.lab-export ## write notebooks/*.ipynb from notebooks/src and execute them
	@$(BIN)/python notebooks/build.py $(ARGS)

workshop: $(VENV)/.lab-export ## the instructor's kit in dist/workshop, wheels for a room without a network included (ARGS=--no-wheels leaves them out)
	@$(BIN)/python -m edgelab.workshop $(ARGS)

reproduce: $(VENV)/.lab-export ## the paper-style tables anew, over seeds, with receipts and verdicts in runs/tables
	@$(BIN)/edgelab reproduce $(ARGS)

sweep: $(VENV)/.core ## the configurations of data/sweep.parquet that are missing (40 minutes of one core for all; resumes where it was stopped)
	@OMP_NUM_THREADS=1 $(BIN)/edgelab sweep --export data/sweep.parquet $(ARGS)
	@$(BIN)/python -m edgelab.manifest --write

compare: $(VENV)/.test-lab-export-bnb ## the table of methods x bits on both embedded models, with the peers that are installed
	@$(BIN)/edgelab compare data/edge-dense --methods all --peers installed --out runs/compare-dense $(ARGS)
	@$(BIN)/edgelab compare data/edge-moe --methods all --peers installed --out runs/compare-moe $(ARGS)

peers: $(VENV)/.core ## install the other tools to compare with, each in .peers/<name> (gigabytes; ARGS="auto-round hqq" chooses)
	@$(BIN)/python -m edgelab.peers install $(ARGS)

# torch.compile wants a C++ compiler; without one training is slower, not impossible
COMPILE := $(if $(shell command -v c++ || command -v g++ || command -v clang++),,--no-compile)
pretrain: $(VENV)/.core ## train the embedded models again (an hour or two; resumes where it was stopped)
	@$(BIN)/python -m edgelab.pretrain moe $(COMPILE) $(ARGS)
	@$(BIN)/python -m edgelab.pretrain dense $(COMPILE) $(ARGS)
	@$(BIN)/python -m edgelab.acceptance data/edge-moe
	@$(BIN)/python -m edgelab.acceptance data/edge-dense
	@$(BIN)/python -m edgelab.manifest --write

phone: $(VENV)/.core ## make the model for a phone again (a quarter of an hour; resumes where it was stopped)
	@$(BIN)/python -m edgelab.phone $(ARGS)
	@$(BIN)/python -m edgelab.manifest --write

studies: $(VENV)/.core ## the long measurements of data/studies that are missing (an hour; ARGS="qat --again" chooses)
	@$(BIN)/python -m edgelab.studies $(ARGS)
	@$(BIN)/python -m edgelab.claims.index
	@$(BIN)/python -m edgelab.manifest --write

lint: $(VENV)/.test-lab-export ## ruff, check only
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.test-lab-export ## ruff, mending what it can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove caches and build output (not .venv, and nothing in runs/: what lies there is yours)
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find edgelab tests notebooks -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------- the environment
# $(VENV)/.made says that the environment exists; $(VENV)/.A-B that extras A and B were installed in it. An installation
# runs again only when pyproject.toml or constraints.txt changed.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "edgelab needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo not there)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing edgelab into $(VENV) (the first time takes some minutes: PyTorch is large)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

comma := ,
$(VENV)/.export $(VENV)/.lab-export $(VENV)/.test-lab-export $(VENV)/.test-lab-export-bnb $(VENV)/.test-lab-export-bnb-gguf-executorch-openvino-coreml: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing edgelab[$(subst -,$(comma),$*)] into $(VENV) (the first time takes some minutes: PyTorch is large)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(subst -,$(comma),$*)]"
	@touch $@

$(VENV)-litert/.made: pyproject.toml .ci/constraints-litert.txt
	@echo "installing edgelab[litert] into $(VENV)-litert"
	@$(PYTHON) -m venv $(VENV)-litert
	@$(VENV)-litert/bin/python -m pip install --quiet --constraint .ci/constraints-litert.txt --editable ".[litert]" pytest
	@touch $@
