# make demo   sets up and runs the demo          make test   sets up and passes the tests
# make soak   runs the harnesses in full          make lint   ruff
# make lowest runs the tests with the lowest versions that setup.py admits
# make clean  removes what the others made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := lite,mmpretrain,mmseg,demo,prompt,tests
INPUTS := setup.py pyproject.toml $(wildcard requirements/*.txt)

.PHONY: demo test soak lowest lint clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --cov

# The harnesses in full: every tool killed twenty times, four ranks, long runs.
soak: $(STAMP)
	$(BIN)/python -m pytest tests/test_faults.py tests/test_long_runs.py --soak -s

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is touched last, so that an interrupted installation is taken up again.
# torch first and alone: with it installed, what depends on it does not pull another build.
$(STAMP): $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c requirements/constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c requirements/constraints.txt torch
	$(BIN)/python -m pip install -q -c requirements/constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-lowest build dist *.egg-info mmaselect/.mim work_dirs/demo

# The suite with the lowest versions that setup.py admits, in an environment of its own.
lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c requirements/lowest.txt 'setuptools<81' wheel torch
	.venv-lowest/bin/python -m pip install -q -c requirements/lowest.txt --no-build-isolation -e '.[$(EXTRAS)]'
	.venv-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--deselect tests/test_packaging.py::test_the_installed_versions_are_those_of_the_constraints
