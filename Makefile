# One environment, two commands: `make demo` and `make test` install all they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test acceptance lint format bench install clean

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/vfx demo

test: .venv/installed
	$(BIN)/pytest -n 2 --dist worksteal

acceptance:
	$(PYTHON) -m tests.acceptance $(ACCEPTANCE)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/python -m benchmarks.bench $(BENCH)

clean:
	rm -rf .venv demo build dist
