# One word for each thing a person does here. A bare machine needs Python 3.11 or later, make and a network.

VENV ?= .venv
ARGS ?=
export PYTHON VENV

.DEFAULT_GOAL := help
.PHONY: help install install-dev serve test check fix

help: ## what there is
	@echo "make what:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1 @\2/p' Makefile | awk -F@ '{ printf "%-16s%s\n", $$1, $$2 }'
	@echo "ARGS='...' adds to the command, as in: make serve ARGS='--port 8000'"

install: ## make .venv with jaxserve in it (PYTHON=... chooses the interpreter)
	@sh scripts/install $(VENV) test

install-dev:
	@sh scripts/install $(VENV) dev

serve: install ## serve the demo model on port 30000
	@exec $(VENV)/bin/jaxserve launch --config smollm2.yaml $(ARGS)

test: install ## run all tests (ARGS='-m "not slow"' for the quick ones)
	@$(VENV)/bin/python -m pytest -q $(ARGS)

check: install-dev ## the gate before a commit: format, lint, types, quick tests
	@sh scripts/check $(ARGS)

fix: install-dev ## format the code and mend what ruff can mend
	@sh scripts/fix
