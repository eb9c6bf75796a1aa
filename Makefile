# Commands for people who work on inbatch; `.ci/run` is what CI runs.

PYTHON ?= python

.PHONY: docs docs-clean settings

docs: ## Build the documentation site into docs/_build/html; a warning is an error.
	$(PYTHON) -m sphinx -b html -E -W --keep-going docs docs/_build/html

docs-clean:
	rm -rf docs/_build

settings: ## Write docs/settings.md from the code.
	$(PYTHON) scripts/settings.py
