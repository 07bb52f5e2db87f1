# `make study` trains the two demos and writes their reports, `make test` checks everything, `make docs` writes the pages
# of the notebooks and modules to _docs/.
# A run that fails stops neither the others nor the reports; the exit status still tells.
# All build .venv when it is missing or older than the pins.

PYTHON ?= python3
STUDY  ?= demo regularization-demo
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: study test docs clean

study: .venv/installed
	@trap 'exit 130' INT; status=0; for s in $(STUDY); do bnonly study $$s || status=1; bnonly report $$s || status=1; done; exit $$status

test: .venv/installed
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 25
	nbdev-test --n-workers 2

docs: .venv/installed
	sphinx-build --quiet --builder html --conf-dir docs . _docs/html
	@echo "the pages are at _docs/html/index.html"

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bnonly needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check uv
	uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[dev]' || \
	  pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
