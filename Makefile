# make demo    install, then compare decoding methods on real code: a table here, a page in report.html
# make test    install, then run the tests
# make coverage  the same, telling which lines they reach; half as slow again
# make check   install, then lint and check types
#
# PYTHON=/path/to/python3.11 names the interpreter; TORCH=... another build of torch than the index's default.

VENV ?= .venv
TORCH ?= torch==2.13.0
SUITABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for one in python3.11 python3 python3.12 python3.13 python; do \
	if $$one -c '$(SUITABLE)' 2>/dev/null; then command -v $$one; break; fi; done)

DEMO = sampling,aggressive-decoding,aded,stree:width=1,eagle,chimera,medusa,speculative-sampling,parallel-jacobi-decoding
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

.PHONY: demo test coverage check install clean

demo: $(VENV)/.installed
	$(BIN)/formery compare code --methods $(DEMO) --limit 6 --max-new-tokens 128 --html report.html

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --cov --cov-report=term

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/mypy

install: $(VENV)/.installed

# The stamps say what the environment holds: nothing is installed again until pyproject.toml changes.
$(VENV)/.torch:
	@$(if $(PYTHON),,echo "Formery needs Python 3.11 or newer with its venv module: install it, or name one that is here with make PYTHON=/path/to/python3.11." >&2; exit 2)
	@echo "Setting up $(VENV) with $(PYTHON); torch is large, this takes a minute or two ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "Installing formery ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what tests and checks need ..."
	@$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf build dist report.html .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
