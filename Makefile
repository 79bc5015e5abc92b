# Each target sets itself up on a machine with Python 3.10 or newer, and installs once.
#   make notebooks   run all notebooks in the profile that fits the machine; copies and HTML in build/notebooks/
#   make test        unit, parity and fault tests, then every notebook again, small and offline
#   make figures     render the committed notebooks anew, in the full profile, and their figures
#   make site        README, docs and the committed notebooks as linked pages, in build/site/; nothing is run
#   make bench       side-by-side timings against the peers, as docs/benchmarks.md shows them
#   make lint        ruff over code and notebooks
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
QUICKLY := PDL_PROFILE=fast PDL_OFFLINE=1 PDL_PROGRESS=0
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=150 --timeout=200 -x -q

.PHONY: notebooks test figures site bench lint clean

notebooks: $(VENV)/.ready
	PYTHON=$(BIN)/python sh scripts/run_notebooks.sh build/notebooks $(NOTEBOOKS)
	@echo "executed notebooks and their HTML: build/notebooks/"

test: $(VENV)/.ready-test
	$(QUICKLY) $(BIN)/python -m pytest --timeout=300 tests
	@set -e; for notebook in $(NOTEBOOKS); do \
	  $(QUICKLY) $(BIN)/python -m pytest $(NBVAL) $$notebook; \
	done

figures: $(VENV)/.ready
	PYTHON=$(BIN)/python PDL_PROFILE=full PDL_FIGURES=figures PDL_PROGRESS=0 \
	  sh scripts/run_notebooks.sh --in-place $(NOTEBOOKS)

site: $(VENV)/.ready
	$(BIN)/python scripts/pages.py build/site README.md $(NOTEBOOKS) $(sort $(wildcard docs/*.md))
	@echo "open build/site/index.html"

bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A torch with its torchvision that is there already (CPU-only builds, say) satisfies pyproject.toml: pip keeps them.
# The stamp is written last: an installation that was cut short is taken up again.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed, this is ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.ready-%: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf build
