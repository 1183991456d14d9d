# Two commands do everything on a fresh machine with Python, a C++ compiler and a package index:
#   make demo    encode a real slide and draw what came out
#   make test    the test suite
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-cluster test-exchange test-matrix faults lint bench docs plots wheel wheels clean

demo: $(INSTALLED)
	$(BIN)/exaonepath demo --out demo-output

# Two at a time, a file's tests together: they share what is slow to make.
test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile --durations=10

# The Ray engine on a real cluster of three nodes on this machine. Ray (about 250 MB) is installed next to the environment.
test-cluster: $(INSTALLED)
	test -d .cluster/ray || $(BIN)/python -m pip install --quiet --disable-pip-version-check --target .cluster "ray>=2.44"
	PYTHONPATH="$(CURDIR)/.cluster" OMP_NUM_THREADS=1 $(BIN)/pytest --durations=10 tests/slides/cohort/test_ray.py

# Exports are read by the tools that they are for: scanpy, squidpy, SpatialData, hs2p, slide2vec, ... (about 800 MB) are
# installed next to the environment, without what only their encoders and readers of slides need. Tools that could not be
# installed are tried again the next time.
test-exchange: $(INSTALLED)
	grep -qs '^{}$$' .exchange/not_installed.json || $(BIN)/python tests/exchange/install_tools.py .exchange
	EXAONEPATH_EXCHANGE_SITE="$(CURDIR)/.exchange" OMP_NUM_THREADS=1 $(BIN)/pytest -rs --durations=10 tests/exchange

# A fast part of the tests on every Python at hand, with the oldest and the newest dependencies; not part of CI, since it
# installs torch each time. PYTHONS="3.10 3.13" and SETS="oldest newest-4 newest-5" restrict it.
test-matrix:
	$(PYTHON) tests/matrix.py

# Every file operation of encode, slide and train failed, killed and interrupted; `make test` takes a part of them.
faults: $(INSTALLED)
	EXAONEPATH_FAULTS=all $(BIN)/pytest -n 2 -s tests/faults

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/pytest bench/ --benchmark-only

# The documentation site, in site/index.html; a broken link or a public name without documentation is an error, and so is
# a notebook that does not run.
docs: $(INSTALLED)
	EXAONEPATH_NOTEBOOKS=run $(BIN)/pytest -n 2 tests/test_notebooks.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27" "mkdocs-jupyter>=0.25"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One picture a question, from whatever bench/results/ holds.
plots: $(INSTALLED)
	$(BIN)/python bench/plots.py

# The wheel is built from the source distribution, so that neither can lack a file.
wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# A wheel for each Python at hand, each checked in a new environment. PYTHONS="3.10 3.13" restricts it.
wheels:
	$(PYTHON) tests/wheels.py

# The virtual environment is made again whenever what it is made of changes.
$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt exaonepath/version.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .cluster .exchange .exchange.new .matrix build dist demo-output site exaonepath/_C*.so *.egg-info
