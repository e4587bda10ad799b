# Targets for a fresh clone; each makes the environment it needs in .venv, and a second run finds it made.
#   make demo      a trained model writes text, with the concepts behind each sentence
#   make test      every test              make quality   what a change must pass besides: style, then types
#   make style     format and fix          make types     mypy alone
#   make nano      train steerling-nano from nothing        make bench   measure
#   make parity    compare, live, with the reference package     make card    write the model cards to build/cards
#   make matrix    every test on the oldest and on the newest libraries that are supported, each in an environment of its own
#   make compatibility    the tests that a new transformers is most likely to break, on the newest of the registry
#   make others    the test suites of transformers and PEFT against Steerling (tests/others/run.py)
PYTHON ?= python3
VENV ?= .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PY := $(VENV)/bin/python
SOURCES := steerling_hf modeling tokenization configs hub_card tests examples benchmarks

.PHONY: demo test quality style types nano bench parity card clean matrix oldest newest compatibility others

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package with what the demo shows, and the package with the tools of development.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[explain]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.installed

# The reference declares other versions of Python and transformers than it runs on, hence the two flags.
$(VENV)/.installed-reference: $(VENV)/.installed-dev
	$(PIP_INSTALL) --no-deps --ignore-requires-python steerling==0.2.0
	$(PIP_INSTALL) pydantic pandas pyarrow
	touch $@

demo: $(VENV)/.installed
	$(PY) -m steerling_hf demo

test: $(VENV)/.installed-dev
	$(PY) -m pytest $(PYTEST_ARGS)

quality: $(VENV)/.installed-dev
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(MAKE) --no-print-directory types

style: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

# Type checkers do not follow setuptools' package-dir, so they get a farm of links laid out as the packages are imported.
types: $(VENV)/.installed-dev
	rm -rf build/types
	mkdir -p build/types/steerling_hf
	ln -s $(CURDIR)/steerling_hf/* build/types/steerling_hf/
	ln -s $(CURDIR)/modeling $(CURDIR)/tokenization $(CURDIR)/configs $(CURDIR)/hub_card build/types/steerling_hf/
	MYPYPATH=build/types $(PY) -m mypy

# Compiled where there is a C++ compiler.
nano: $(VENV)/.installed-dev
	$(PY) examples/nano/train.py $(if $(shell command -v c++),--compile)

# The reference is installed to be timed beside ours.
bench: $(VENV)/.installed-reference
	$(PY) benchmarks/tokenization.py
	$(PY) benchmarks/generation.py
	$(PY) benchmarks/ragged.py
	$(PY) benchmarks/memory.py
	$(PY) benchmarks/steering.py
	$(PY) benchmarks/attribution.py
	$(PY) benchmarks/throughput.py --size small --new-tokens 64

parity: $(VENV)/.installed-reference
	$(PY) tests/reference/live.py

# The ends of what pyproject.toml allows. The oldest transformers comes with what the suite is pinned to; the newest set is held by
# nothing but torch, whose later wheels all carry CUDA.
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

oldest: pyproject.toml constraints.txt
	$(MAKE) --no-print-directory VENV=.venv-oldest .venv-oldest/bin/python
	mkdir -p build
	sed 's/^transformers==.*/transformers==$(OLDEST_TRANSFORMERS)/' constraints.txt > build/constraints-oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c build/constraints-oldest.txt -e '.[dev]'

newest: pyproject.toml constraints.txt
	$(MAKE) --no-print-directory VENV=.venv-newest .venv-newest/bin/python
	mkdir -p build
	grep '^torch==' constraints.txt > build/constraints-newest.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-c build/constraints-newest.txt -e '.[dev]'

matrix: oldest newest
	$(PYTHON) tests/matrix.py oldest newest -- $(PYTEST_ARGS)

# Where the pins are the newest already, so is their environment.
compatibility: $(VENV)/.installed-dev
	@if $(PY) -m pip install --quiet --dry-run --upgrade --no-deps --report - transformers | grep -q '"install": \[\]'; \
	then echo 'The pinned transformers is the newest of the registry.'; $(PY) -m pytest -m compatibility; \
	else $(MAKE) --no-print-directory newest && $(PYTHON) tests/matrix.py newest -- -m compatibility; fi

# A fresh environment: others' suites bring libraries that ours must do without.
others: pyproject.toml constraints.txt tests/others/requirements.txt
	$(MAKE) --no-print-directory VENV=.venv-others .venv-others/.installed-dev
	.venv-others/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/others/requirements.txt
	.venv-others/bin/python tests/others/run.py transformers
	.venv-others/bin/python tests/others/run.py peft

card: $(VENV)/.installed
	$(PY) -m steerling_hf.card build/cards

clean:
	rm -rf build dist $(VENV) .venv-oldest .venv-newest .venv-others .pytest_cache .mypy_cache .ruff_cache
