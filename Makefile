# Everyday commands. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help install build check format test test-slow bench bench-data report kernel-tables gpu-check gpu-bench gpu-check-dry gpu-bench-dry demo clean

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

bench: ## Run the benchmarks that need no data of yours (hours, no other load) and write docs/results.md
	python -m benchmarks.mixed
	python -m benchmarks.tenants
	python -m benchmarks.pipeline
	python -m benchmarks.load
	python -m benchmarks.simulate
	python -m benchmarks.neighbours
	python -m benchmarks.generation
	python -m benchmarks.shared_prompts
	python -m benchmarks.residency
	python -m benchmarks.tenant_store
	python -m benchmarks.plot
	python -m benchmarks.kernels
	python -m benchmarks.joint_training
	python -m benchmarks.miss
	python -m benchmarks.materialise
	python -m benchmarks.parity
	python -m benchmarks.report

# Of corpora and of a decoder: benchmarks.counting, .coverage_growth, .drift (--corpus) and .perplexity (--model).
bench-data: ## Run those of labelled sets (days): make bench-data DATA=folder
	python -m benchmarks.accuracy --data $(DATA)
	python -m benchmarks.few_examples --data $(DATA)
	python -m benchmarks.composition --data $(DATA)
	python -m benchmarks.compression --data $(DATA)
	python -m benchmarks.merge_forms --data $(DATA)
	python -m benchmarks.report

report: ## Write docs/results.md from benchmarks/results/*.json
	python -m benchmarks.report

gpu-check: ## Are the kernels right on this GPU? (8 minutes at most)
	python -m benchmarks.gpu.check

gpu-bench: ## How fast are they, beside what others do? (15 minutes at most, no other load on the GPU)
	python -m benchmarks.gpu.bench
	python -m benchmarks.gpu.serving
	python -m benchmarks.gpu.generation

gpu-check-dry: ## The same check on the CPU, by emulator and interpreter
	python -m benchmarks.gpu.check --dry

gpu-bench-dry: ## The same benchmark on the CPU, without measuring
	python -m benchmarks.gpu.bench --dry
	python -m benchmarks.gpu.serving --dry
	python -m benchmarks.gpu.generation --dry

kernel-tables: build ## Count bytes and bank conflicts of the kernels and write them into docs/kernels.md
	PYTHONPATH=tests python -m kernels.cuda.write_tables

demo: ## The whole system on real text
	hmi demo

clean: ## Remove what was built
	rm -rf build dist *.egg-info hmi-demo hmi_kernels/*.so
