# Two commands do all set-up: `make run` (the default recipe) and `make test`.
PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 0-4
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: run test unit wheel-test outputs micro-run micro-base results docs benchmarks clean

run: $(VENV)/.ready
	$(BIN)/s3ft run s3ft-micro

test: $(VENV)/.ready-dev
	bash tests/run.sh $(BIN)

unit: $(VENV)/.ready-dev
	bash tests/run.sh $(BIN) unit

wheel-test: $(VENV)/.ready-dev
	bash tests/wheel.sh $(BIN)

outputs: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/chapters.py --write
	$(BIN)/nbdev_clean

micro-run: $(VENV)/.ready-dev
	$(BIN)/python tests/bundle.py

micro-base: $(VENV)/.ready
	$(BIN)/s3ft run micro-base
	cp runs/micro-base/base/model/* data/micro-base/

results: $(VENV)/.ready
	$(BIN)/s3ft run s3ft-micro --seeds $(SEEDS) --out runs/s3ft-micro-seeds
	$(BIN)/python tests/results.py runs/s3ft-micro-seeds RESULTS.md

docs: $(VENV)/.ready-docs
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f build/mkdocs.yml

benchmarks: run
	$(BIN)/python tests/benchmarks/bench_engine.py
	$(BIN)/python tests/benchmarks/bench_template.py
	$(BIN)/python tests/benchmarks/bench_chain.py
	$(BIN)/python tests/benchmarks/bench_copies.py
	$(BIN)/python tests/benchmarks/bench_kept.py
	$(BIN)/python tests/benchmarks/bench_forest.py

$(VENV)/.ready: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(PIP) -e ".[docs]"
	touch $@

clean:
	rm -rf build _docs dist *.egg-info .pytest_cache
