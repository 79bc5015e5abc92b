# Each target sets itself up on a fresh machine with Python 3.10+, and installs once.
#   make notebooks   run all notebooks in the profile that fits the machine; copies and HTML in build/
#   make test        unit, parity and fault tests, then every notebook again, fast and offline
#   make mutants     deliberate mistakes in the code, one at a time: would the tests notice?
#   make bench       side-by-side timings against the peers, 15 minutes at most; figures/benchmarks.json and .png
#   make figures     render the committed notebooks anew, in place and in the full profile
#   make lint        ruff over code and notebooks
#   make address REPOSITORY=owner/name   write the address on GitHub where it belongs, with badges for Colab
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
QUICKLY := PDL_PROFILE=fast PDL_OFFLINE=1 PDL_PROGRESS=0
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=300 --timeout=900 -x -q

.PHONY: notebooks test mutants bench figures lint address clean

notebooks: $(VENV)/.ready-test
	$(BIN)/python -m pdl_utils.run_notebooks --out build/notebooks $(NOTEBOOKS)

test: $(VENV)/.ready-test
	$(QUICKLY) $(BIN)/python -m pytest tests
	@set -e; for notebook in $(NOTEBOOKS); do \
	  $(QUICKLY) $(BIN)/python -m pytest $(NBVAL) $$notebook; \
	done

mutants: $(VENV)/.ready-test
	$(BIN)/python tests/mutants.py

bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run_all.py

figures: $(VENV)/.ready-test
	PDL_PROFILE=full PDL_PROGRESS=0 $(BIN)/python -m pdl_utils.run_notebooks --in-place $(NOTEBOOKS)
	$(BIN)/python -m pdl_utils.results

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

address: $(VENV)/.ready-test
	$(BIN)/python -m pdl_utils.address '$(REPOSITORY)'

# The stamp is written last: an installation that was cut short is taken up again.
$(VENV)/.ready-%: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed, this is ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf build
