# make study    run the study at the quick budget and write the report
# make test     lint and run the tests
# make notebooks  write what is shown of the reference results anew, from its records
# make lab      open the notebooks in Jupyter
# make bench    measure speed and memory beside the plain alternatives
# ARGS is handed on:  make study ARGS="--profile full --seeds 0 1 2"

PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test notebooks lab bench

study: .venv/ready
	$(BIN)/study run $(ARGS)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

notebooks: .venv/ready
	$(BIN)/python results/show.py

lab: .venv/ready
	$(BIN)/jupyter lab notebooks $(ARGS)

bench: .venv/ready
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

# torch comes first and exactly as pinned: a range would be answered with the newest build and its CUDA packages.
.venv/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Setting up .venv: about 2.5 GB, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,test]'
	@touch $@
