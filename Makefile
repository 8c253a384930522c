# make demo   sets up and runs the demo          make test   sets up and passes the tests
# make soak   runs the harnesses in full          make lint   ruff
# make lowest runs the tests with the lowest versions that setup.py admits; in CI, make test does so, too
# make clean  removes what the others made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
EXTRAS := lite,mmpretrain,mmseg,demo,prompt,tests
INPUTS := setup.py pyproject.toml $(wildcard requirements/*.txt)
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test soak lowest lint clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST) --cov
ifdef CI
	$(MAKE) lowest
endif

# The harnesses in full: every tool killed twenty times, four ranks, long runs.
soak: $(STAMP)
	$(BIN)/python -m pytest tests/test_faults.py tests/test_long_runs.py --soak -s

# The suite with the lowest versions that setup.py admits, in an environment of its own.
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python $(PYTEST) \
		--deselect tests/test_packaging.py::test_the_installed_versions_are_those_of_the_constraints

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): CONSTRAINTS := requirements/constraints.txt
$(LOWEST)/.installed: CONSTRAINTS := requirements/lowest.txt
# The stamp is touched last, so that an interrupted installation is taken up again.
# torch first and alone: with it installed, what depends on it does not pull another build.
%/.installed: $(INPUTS)
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) 'setuptools<81' wheel
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) torch
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) .coverage build dist *.egg-info mmaselect/.mim work_dirs/demo
