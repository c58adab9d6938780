# Everyday commands. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help install build check format test test-slow bench report demo clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: ## Install for development, with everything
	pip install -c constraints.txt -e '.[dev]'

build: ## Compile the extension again after a change of csrc/ (incremental)
	python setup.py build_ext --inplace

check: ## Lint, types, layers
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: ## Format the Python sources
	ruff check --fix .
	ruff format .

test: ## The tests
	pytest

test-slow: ## The tests that take minutes
	pytest -m slow

bench: ## Run all benchmarks (no other load on the machine) and write docs/results.md
	python -m benchmarks.mixed
	python -m benchmarks.plot
	python -m benchmarks.kernels
	python -m benchmarks.accuracy
	python -m benchmarks.report

report: ## Write docs/results.md from benchmarks/results/*.json
	python -m benchmarks.report

demo: ## The whole system on real text
	hmi demo

clean: ## Remove what was built
	rm -rf build dist *.egg-info hmi-demo hmi_kernels/*.so
