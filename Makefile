# make demo   set up, make phantoms, train, predict, and write a report
# make test   set up and pass every test
# make lab    open the course in JupyterLab
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lab setup notebooks drift lint readme bench clean

setup: $(READY)

$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12" && exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/medseg demo

test: $(READY)
	$(BIN)/python tests/check_drift.py
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev-test --n-workers 2 --timing --cell-timeout 300
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=nbs index.ipynb

readme: $(READY)
	$(BIN)/python tests/check_drift.py --write

bench: $(READY)
	@for file in $(filter-out $(addprefix benchmarks/,measure.py real_pairs.py half_labels.py real_tumours.py),$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) runs build dist *.egg-info
