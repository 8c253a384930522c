# make demo   sets up and runs the demo          make test   sets up and passes the tests
# make soak   runs the harnesses in full          make lint   ruff
# make docs   builds docs/_build/html      make docs-links checks its links to other sites, too
# make lowest runs the tests with the lowest versions that setup.py admits
# make newest installs README's pip line as a user would and tries what README shows; FULL=1 runs all tests, too
# make clean  removes what the others made
# In CI, make test runs lowest and newest as well. requirements/README.md says what each set of versions is for.
PYTHON ?= python3
LOWEST_PYTHON ?= python3.9
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
NEWEST := .venv-newest
EXTRAS := lite,mmpretrain,mmseg,mmdet,demo,prompt,tests
INPUTS := setup.py pyproject.toml $(wildcard requirements/*.txt)
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := -m pytest $(PARALLEL)

NOT_PINNED := --deselect tests/test_packaging.py::test_the_installed_versions_are_those_of_the_constraints

.PHONY: demo test docs docs-links soak lowest newest lint clean

demo: $(STAMP)
	@$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST) --cov
	$(MAKE) docs
ifdef CI
	$(MAKE) lowest
	$(MAKE) newest
endif

# Warnings are errors: a link that leads nowhere, a page that no table of contents has, a docstring that is no text.
SPHINX := -m sphinx -q -W --keep-going -d docs/_build/doctrees
docs: $(STAMP)
	$(BIN)/python $(SPHINX) -b html docs/en docs/_build/html
	@echo docs/_build/html/index.html

docs-links: $(STAMP)
	$(BIN)/python $(SPHINX) -b linkcheck docs/en docs/_build/linkcheck

# The harnesses in full: every tool killed twenty times, four ranks, long runs.
soak: $(STAMP)
	$(BIN)/python -m pytest tests/test_faults.py tests/test_long_runs.py --soak -s

# The suite with the lowest versions that setup.py admits, in an environment of its own.
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python $(PYTEST) $(NOT_PINNED)

# What README promises, with the versions that pip chooses today. The wheel is imported, not the checkout: Python would
# put the working directory in front.
newest: export PYTHONSAFEPATH := 1
TRIED := $(addprefix tests/,test_compat.py test_readme.py \
	test_toolboxes.py::test_the_cub_config_by_mmpretrains_own_tools \
	test_segmentation.py::test_training_by_mmsegs_own_tool)
newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pip install -q --no-deps --force-reinstall $(NEWEST)/wheel/*.whl
	$(NEWEST)/bin/pytest $(PARALLEL) tests/stack/every_order_of_imports.py $(if $(FULL),tests $(NOT_PINNED),$(TRIED))
	rm -rf $(NEWEST)/demo
	$(NEWEST)/bin/python tools/demo.py --work-dir $(NEWEST)/demo

# README's line is taken from README, so that the two cannot differ; what only the tests need comes after it. The second
# call names README's extras again: without their bounds it would raise setuptools past what mmengine imports.
README_EXTRAS = $(shell sed -n "s/^pip install 'mmaselect\(\[[a-z,]*\]\)'.*/\1/p" README.md)
$(NEWEST)/.installed: $(INPUTS) README.md | $(NEWEST)/wheel
	for extras in '$(README_EXTRAS)' '$(README_EXTRAS:%]=%,mmdet,demo,prompt,tests])'; do \
		$(NEWEST)/bin/python -m pip install -q -U --upgrade-strategy eager "$$(echo $(NEWEST)/wheel/*.whl)$$extras" \
			|| exit 1; done
	touch $@

.PHONY: $(NEWEST)/wheel
$(NEWEST)/wheel:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	rm -rf build $@
	$(NEWEST)/bin/python -m pip wheel -q --no-deps -w $@ .
	rm -rf build

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): CONSTRAINTS := requirements/constraints.txt
$(STAMP): EXTRAS := $(EXTRAS),docs
$(LOWEST)/.installed: CONSTRAINTS := requirements/lowest.txt
# Earlier ones try version after version of what Python 3.9 has no new one of: for an hour, not for a minute.
$(LOWEST)/.installed: PIP := 'pip>=25.1'
# pyenv's python3.9 runs where PYENV_VERSION names it.
$(LOWEST)/.installed: INTERPRETER = $(shell PYENV_VERSION=3.9 $(LOWEST_PYTHON) -c 'import ensurepip' 2>/dev/null && \
	echo PYENV_VERSION=3.9 $(LOWEST_PYTHON) || { echo 'no $(LOWEST_PYTHON): $(PYTHON) instead' >&2; echo $(PYTHON); })
# The stamp is touched last, so that an interrupted installation is taken up again.
# torch first and alone: with it installed, what depends on it does not pull another build.
%/.installed: INTERPRETER = $(PYTHON)
%/.installed: $(INPUTS)
	test -x $*/bin/python || $(INTERPRETER) -m venv $*
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) $(PIP) 'setuptools>=64,<81' wheel
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) torch
	$*/bin/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .coverage build dist docs/_build *.egg-info mmaselect/.mim work_dirs/demo
