# Every target makes its own environment first (.ci/setup: idempotent, some milliseconds once it stands).
SHELL := /bin/bash
PYTHON := .venv/bin/python -P
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slurm docs-test soak lint format reference bench faults-table clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

venv: ## find Python >= 3.12, make .venv, install
	@.ci/setup

quickstart: venv ## from raw text to a trained model; DATA=path takes your own jsonl, parquet or txt
	@env -u OMP_NUM_THREADS .venv/bin/python -m launcher quickstart $(if $(DATA),--data $(DATA))

# A file's tests share what it sets up, so a file goes to one worker; those with slow tests begin first.
# A forked rank shares the pages of its worker: large ones make each fork cheaper. One worker in three waits for something.
# What is imported is compiled once, whatever the caller's environment says, not by each process that a test starts.
SPREAD := --dist loadscope --no-loadscope-reorder --maxprocesses 8 -n $$((3 * $$(env -u OMP_NUM_THREADS nproc) / 2))
PYTEST := env -u PYTHONDONTWRITEBYTECODE GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PYTHON) -m pytest

test: venv ## the tests, but those that need a Slurm
	@$(PYTEST) $(SPREAD) -m "not long and not slurm"

test-slurm: venv ## all faults of a cluster, on a real Slurm of four nodes (as root; installs Debian's packages); SHORT=1: two
	@$(PYTHON) -m pytest -n 3 -m "slurm$(if $(SHORT), and not long)" tests/slurm

docs-test: venv ## run every command of README and docs/ that a CPU can run (a quarter of an hour)
	@PYTHONPATH=. $(PYTHON) -m tests.accept_docs

soak: venv ## the long proofs: tests without room in `make test`, all layouts, kills and faults by the hundred (hours)
	@$(PYTEST) $(SPREAD) -m "long and not slurm"
	@$(PYTHON) -m launcher verify configs/quickstart.yaml --matrix tests/layouts.yaml --strict
	@$(PYTHON) -m launcher verify --matrix tests/families.yaml --strict
	@set -e; for proof in "kill_resume.py --rounds 200" "kill_corpus.py --rounds 50" "chaos.py --minutes 30"; do \
	    echo "== $$proof"; .venv/bin/python benchmarks/$$proof; \
	done

lint: venv ## ruff and pyright
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m pyright

format: venv ## let ruff sort imports and lay out the code
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

reference: venv ## write docs/configuration.md from the code
	@$(PYTHON) -m launcher.reference > docs/configuration.md.new && mv docs/configuration.md.new docs/configuration.md

bench: venv ## the benchmarks; each prints a table and writes it to build/bench/ as JSON
	@mkdir -p build/bench; failed=; \
	for script in train_overhead start_up loader checkpoint dedup tokenize accelerator; do \
	    echo "== $$script"; PYTHONWARNINGS=ignore .venv/bin/python benchmarks/$$script.py --json build/bench/$$script.json || failed="$$failed $$script"; \
	done; [ -z "$$failed" ] || { echo "missed its bar or failed:$$failed"; exit 1; }

faults-table: venv ## docs/reliability.md from the tests' markers; fails where one of the thirty faults has no test
	@PYTHONPATH=. $(PYTHON) -m tests.faults_table

clean: ## remove caches and build products; runs, stores and .venv stay
	@rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
