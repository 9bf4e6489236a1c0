# `make demo` and `make test` need only python3 >= 3.11; they make .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
RUN = OPENBLAS_NUM_THREADS=1 $(VENV)/bin/python
JOBS ?= 2

.PHONY: demo test slow lint format clean

demo: $(VENV)/installed
	$(RUN) examples/train_digits.py

test: $(VENV)/installed
	$(RUN) -m pytest -n $(JOBS) -m "not slow" $(PYTEST_ARGS)

slow: $(VENV)/installed-tpu
	$(RUN) -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) out

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# For `make slow` alone: libtpu, 700 MB, compiles for TPUs that are not here.
$(VENV)/installed-tpu: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]'
	touch $@
