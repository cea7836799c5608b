# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORAGE ?= runs

.PHONY: install dev quickstart test test-slow faults faults-cluster lint size reference ui submit clean

# uv is much faster than pip. Without --no-compile, pip compiles 21,000 files, most of which are never
# imported: half of the time.
PIP := $(if $(shell command -v uv),uv pip install --python $(BIN)/python,\
	$(BIN)/python -m pip install --no-compile --progress-bar off --disable-pip-version-check)

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing torch, Ray, MLflow and what they need into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[fast]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what tests and lint need into $(VENV)"
	$(PIP) --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(VENV)/installed
dev: $(VENV)/installed-dev   ## also what tests and lint need

quickstart: install          ## corpus to trained, tracked GPT in a few minutes on two CPU cores
	$(BIN)/python pipelines/train.py configs/quickstart.yaml

# Two processes, each with a Ray of its own: what tests wait for, they wait for side by side. A file stays in one process.
TEST_JOBS ?= 2
test: dev                    ## everything, with a real Ray, a real MLflow and real kills; TEST_JOBS=0: one after another
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test-slow: dev               ## what `make test` leaves out: slow variants, many examples of each property
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --timeout 3600 -m slow tests
	$(BIN)/python -m pytest -n $(TEST_JOBS) --timeout 3600 --hypothesis-profile many -m hypothesis tests

# Minutes; the table goes into docs/fault-tests.md.
N ?= 300
SEED ?= 1
faults: dev                  ## make faults N=300 SEED=1: a campaign of faults, each run compared with an undisturbed one
	$(BIN)/python -m tests.faults.campaign -n $(N) --seed $(SEED) --write

faults-cluster: dev          ## make faults-cluster N=40: the same on three machines, which are namespaces of this one; needs root
	$(BIN)/python -m tests.machines.campaign -n $(N) --seed $(SEED) --write

lint: dev                    ## format, lint rules and types, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

size: install                ## lines, tokens, files and the longest function of each package
	$(BIN)/python benchmarks/size.py

reference: install           ## docs/reference.md, the page of all fields, from the configuration
	$(BIN)/python -m orchestrator.config.reference > docs/reference.md

ui: install                  ## MLflow's pages for the runs in $(STORAGE), on loopback
	$(BIN)/python pipelines/ui.py $(STORAGE)

# A job's copy of this folder has no repository: the commit is taken here and travels with the job.
PIPELINE ?= train
EXPERIMENT ?= configs/quickstart.yaml
RETRY ?= 0
submit: install              ## make submit [PIPELINE=sweep] [RETRY=10] EXPERIMENT=… ARGS='section.field=value …', to the cluster of $$RAY_API_SERVER_ADDRESS
	$(BIN)/python deploy/submit.py $(RETRY) $(BIN)/ray job submit --working-dir . --runtime-env-json \
	  "{\"env_vars\": {\"ESPALIER_GIT_COMMIT\": \"$$(git rev-parse HEAD)\", \"ESPALIER_GIT_DIRTY\": \"$$(test -z "$$(git status --porcelain)" && echo 0 || echo 1)\"}}" \
	  -- pipelines/$(PIPELINE).py $(EXPERIMENT) $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
