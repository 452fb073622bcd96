# Every target builds what it needs: a fresh clone wants only Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export DS_LOG_LEVEL ?= warning

.PHONY: setup quickstart test lint demo reproduce clean

setup: $(VENV)/.ready

# torch first and alone: with it in place nothing else asks for another build of it.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.8,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[eval,vesl,dev]"
	touch $@

quickstart: setup
	$(BIN)/python scripts/quickstart.py

reproduce: setup
	$(BIN)/python scripts/reproduce.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	$(BIN)/python demo/app.py

clean:
	rm -rf $(VENV) build *.egg-info
