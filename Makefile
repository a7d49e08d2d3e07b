# Everything a fresh machine with Python >= 3.11, pip and make needs: `make run`, `make test`.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
AOT_VENV ?= .venv-aot
DOCS_VENV ?= .venv-docs
MODEL ?= smollm2-135m-instruct
ARGS ?=
# Two workers: the suite is compile-bound, and each further worker costs 4 s of imports.
WORKERS ?= 2

# Debian ships python3 without ensurepip, so the pip beside PYTHON installs into the environment,
# and installs pip there too: `lminf fetch` calls it.
PIP = $(PYTHON) -m pip --disable-pip-version-check --python
IN = $(VENV)/bin/

.PHONY: help run test slow parity aot fuzz lint lint-code lint-format lint-types format docs notebooks clean

help:
	@echo "make run      install, fetch $(MODEL), measure it past its training length"
	@echo "make test     the fast tests          make slow    the real model, minutes"
	@echo "make lint     ruff and pyright        make parity  against transformers and torch"
	@echo "make aot      kernels compiled for TPU v5e, v6e and H100, on any machine"
	@echo "make fuzz     damaged files and words, 10,000 of them"
	@echo "make docs     the site in build/site  make notebooks  runs them and keeps their outputs"

run: $(VENV)/.installed
	$(IN)lminf fetch $(MODEL)
	$(IN)python -m experiments.length_generalization $(ARGS)

test slow parity aot fuzz: export JAX_PLATFORMS = cpu
# libtpu otherwise asks a cloud machine's metadata server about its chips.
aot: export TPU_SKIP_MDS_QUERY = 1

test: $(VENV)/.installed-dev
	$(IN)python -m pytest -m "not slow and not parity and not aot" -n $(WORKERS) $(ARGS)

slow: $(VENV)/.installed-dev
	$(IN)python -m pytest -m "slow and not parity and not aot" -n $(WORKERS) --dist worksteal $(ARGS)

# 10,000 damaged inputs for every reader of files and words: minutes.
fuzz: $(VENV)/.installed-dev
	$(IN)python -m tests.fuzz $(ARGS)

parity: $(PARITY_VENV)/.installed-parity
	$(PARITY_VENV)/bin/python -m pytest -m parity -n $(WORKERS) --dist worksteal $(ARGS)

aot: $(AOT_VENV)/.installed-aot
	$(AOT_VENV)/bin/python -m pytest -m aot -n $(WORKERS) --dist worksteal $(ARGS)

lint: lint-code lint-format lint-types

lint-code: $(VENV)/.installed-dev
	$(IN)ruff check .

lint-format: $(VENV)/.installed-dev
	$(IN)ruff format --check .

lint-types: $(VENV)/.installed-dev
	$(IN)pyright --pythonpath $(IN)python

format: $(VENV)/.installed-dev
	$(IN)ruff check --fix .
	$(IN)ruff format .

docs: $(VENV)/.installed $(DOCS_VENV)/.installed-docs
	JAX_PLATFORMS=cpu $(IN)python docs/make_tables.py
	JAX_PLATFORMS=cpu $(IN)python docs/frontier.py
	$(DOCS_VENV)/bin/zensical build --strict --clean

# On whatever device there is; LMINF_TINY=FOLDER ARGS=--check only looks whether they run.
notebooks: $(VENV)/.installed-dev
	$(IN)python notebooks/execute.py $(ARGS)

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(AOT_VENV) $(DOCS_VENV) .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml
	$(call make_venv,$(VENV))
	$(PIP) $(VENV) install pip -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(call make_venv,$(VENV))
	$(PIP) $(VENV) install pip -e '.[dev,data]'
	@touch $(VENV)/.installed $@

# torch 2.13.0 exactly (pyproject.toml): other specifiers pull gigabytes of CUDA wheels.
$(PARITY_VENV)/.installed-parity: pyproject.toml
	$(call make_venv,$(PARITY_VENV))
	$(PIP) $(PARITY_VENV) install -e '.[dev,parity]'
	@touch $@

$(AOT_VENV)/.installed-aot: pyproject.toml
	$(call make_venv,$(AOT_VENV))
	$(PIP) $(AOT_VENV) install -e '.[dev,aot]'
	@touch $@

# Without the project: the site is made from its text.
$(DOCS_VENV)/.installed-docs: pyproject.toml
	$(call make_venv,$(DOCS_VENV))
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_VENV)/requirements.txt
	$(PIP) $(DOCS_VENV) install -r $(DOCS_VENV)/requirements.txt
	@touch $@

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: $(PYTHON) is Python %d.%d; use make PYTHON=python3.11 or newer" % sys.version_info[:2])'
	$(PYTHON) -m venv $(1) || $(PYTHON) -m venv --clear --without-pip $(1)
endef
