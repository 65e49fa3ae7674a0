# make chat    talk with the model that ships with this repository
# make check   lint and formatting        make format  put the formatting right
# make test    check and all tests        make clean   remove what these commands made
#              (make test-long: trainings of minutes, which show what the recipes reach)
#
# Each makes the environment it needs; nothing has to be installed before but Python and make.
# PYTHON=/path/to/python chooses another Python, MODEL=... another model to chat with.

.DEFAULT_GOAL := help
.PHONY: help chat check format test test-long test-oldest demo-models clean
.DELETE_ON_ERROR:

MODEL ?= demo
BIN := .venv/bin
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

# The first Python that is new enough and can make virtual environments.
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
NAMES := python3 python python3.13 python3.12 python3.11 python3.10
FIND_PYTHON = for name in $(or $(PYTHON),$(NAMES)); do \
	$$name -c '$(SUITABLE)' 2> /dev/null && echo $$name && break; done
NO_PYTHON := chatglm needs Python 3.10 or newer with its venv module (Debian and Ubuntu: \
	apt install python3-venv); make PYTHON=/path/to/python names one.
INSTALL = @echo 'Installing into $(@D), once; torch is large, so this takes a while.'; \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

chat: .venv/chat
	@$(BIN)/chatglm chat $(MODEL)

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Files of tests run side by side, each in one process; more processes than four would mostly need more memory.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
ALL_BUT_LONG := -m 'not long'

# tests/hub loads folders with trust_remote_code in a process that never imports chatglm.
test: check
	$(BIN)/python $(PYTEST) tests/hub
	$(BIN)/python $(PYTEST) $(ALL_BUT_LONG) --ignore=tests/hub

# Minutes of training that show what the recipes in docs/ reach; for whoever changes training or what it learns from.
test-long: .venv/test
	$(BIN)/python $(PYTEST) -m long

# Kernels, downloads, vocabularies, reports, servers, pages and terminals do not know transformers: tested with one of
# its releases only.
KNOW_NO_TRANSFORMERS := $(wildcard $(addprefix tests/test_,*_kernel*.py server*.py web*.py cli_chat*.py)) \
	$(foreach name,ask bench checkpoint client demo_data download replicas slim verify,tests/test_$(name).py)
test-oldest: .venv-oldest/test
	.venv-oldest/bin/python $(PYTEST) tests/hub
	.venv-oldest/bin/python $(PYTEST) $(ALL_BUT_LONG) --ignore=tests/hub $(KNOW_NO_TRANSFORMERS:%=--ignore=%)

demo-models: .venv/demo
	$(BIN)/python -m demo.train --model demo --output chatglm/models/demo
	$(BIN)/python -m demo.train --model demo-v1 --output chatglm/models/demo-v1

clean:
	rm -rf .venv .venv-oldest build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

%/bin/python:
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo '$(NO_PYTHON)' >&2; exit 1; fi; \
	echo "Making $* with $$($$python --version)."; $$python -m venv $*

# Empty files that tell what is installed; newer requirements install again.
.venv/chat: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --constraint constraints.txt --editable .
	@touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --constraint constraints.txt --editable '.[test]'
	@touch .venv/chat $@

.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --constraint constraints.txt --editable '.[demo]'
	@touch .venv/chat $@

.venv-oldest/test: pyproject.toml constraints.txt | .venv-oldest/bin/python
	@sed '/^\(transformers\|huggingface_hub\|tokenizers\)==/d' constraints.txt > $(@D)/constraints.txt
	@echo 'transformers==$(OLDEST_TRANSFORMERS)' >> $(@D)/constraints.txt
	$(INSTALL) --constraint $(@D)/constraints.txt --editable '.[test]'
	@touch $@
