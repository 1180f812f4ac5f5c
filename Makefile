# The same few commands everywhere. Needed: Python 3.11 or newer, pip and make.
#
#   make story      install, train a Llama on fairy tales for three minutes, tell a story
#   make test       install with the test tools, run every test that needs no GPU
#   make check      formatting, linting, types, imports, tests; prints how long each file is
#   make torture    the slow proofs in full length: a thousand kills, 64 full disks, every mutant and more
#   make figures    draw docs/figures again
#   make clean      remove what these commands made (never runs/)
#
# Another Python: make story PYTHON=python3.12. Options for pip come from pip's own settings (PIP_... or pip.conf).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: story test check lint lines torture figures clean

story: $(VENV)/.installed
	$(BIN)/babyllama story

CORES = $$($(BIN)/python -c 'from babyllama.machine import physical_cores as cores; print(min(4, cores()))')

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses "$(CORES)" --dist loadfile

check: lint test

lint: $(VENV)/.installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py
	@$(MAKE) --no-print-directory lines

lines:
	@find babyllama -name '*.py' -not -name '__init__.py' | LC_ALL=C sort | xargs wc -l

torture: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m torture -s

figures: $(VENV)/.installed-test
	$(BIN)/python docs/figures/block.py
	$(BIN)/python docs/figures/components.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find babyllama tests benchmarks docs -name __pycache__ -type d -exec rm -rf {} +

# Each stamp says that its tools stand in the environment; it ages when the list of packages changes.

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-check: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) '.[test,check]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo; \
	  echo "Baby Llama needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "  Fix: name another one:  make $(MAKECMDGOALS) PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo; \
	  echo "'$(PYTHON) -m venv' did not work. Debian and Ubuntu keep it in a package of its own."; \
	  echo "  Fix: sudo apt install python3-venv"; \
	  rm -rf $(VENV); \
	  exit 1; }
	@touch $@
