# Two commands: `make study` trains the two demos and writes their reports, `make test` checks everything.
# Both build .venv when it is missing or older than the pins.

PYTHON ?= python3
STUDY  ?= demo regularization-demo
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: study test clean

study: .venv/installed
	@for s in $(STUDY); do bnonly study $$s && bnonly report $$s || exit 1; done

test: .venv/installed
	pytest -q
	nbdev-test --n-workers 2

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
