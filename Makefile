PYTHON ?= python3
VENV := .venv
NLA := $(VENV)/bin/nla

.PHONY: reproduce test faults report pdf bench growth batch env clean

# An environment runs the checkout that it was made in, wherever that has been moved or copied to since.
env: $(VENV)/.installed
	@test "$$(cat $(VENV)/.installed)" = "$(CURDIR)" || { \
	  echo "$(VENV) was made in $$(cat $(VENV)/.installed), this is $(CURDIR): run make clean first"; exit 1; }

# The versions of the lock file; made once, made again when the lock file changes.
LOCKED := $(VENV)/bin/pip install --quiet --constraint requirements.lock
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) setuptools
	$(LOCKED) --no-build-isolation --editable ".[test]"
	echo "$(CURDIR)" > $@

# Snakemake, which batches alone need.
$(VENV)/.batch: $(VENV)/.installed
	$(LOCKED) --no-build-isolation --editable ".[batch]"
	touch $@

reproduce: env
	$(NLA) reproduce --backbone gemma3-270m --profile quick

test: env $(VENV)/.batch
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

# Every call to the file system or the hub that a small run makes, refused in four ways, one at a time.
faults: env
	OMP_NUM_THREADS=1 NLA_FAULT_POINTS=100000 $(VENV)/bin/python -m pytest -q --capture no tests/slow/test_faults.py

bench: env
	cd benchmarks && ../$(VENV)/bin/python run.py

growth: env
	cd benchmarks && ../$(VENV)/bin/python growth.py

# The section as a PDF, in build/; needs latexmk.
pdf: env
	cd paper && latexmk -pdf -interaction=nonstopmode -halt-on-error -outdir=../build section11.tex

# Pages, tables and figures from the committed results.
report: env
	$(NLA) report

# Another batch: make batch BATCH=my.yaml CORES=8
BATCH ?= workflow/small.yaml
CORES ?= 2

batch: $(VENV)/.batch
	$(VENV)/bin/snakemake --snakefile workflow/Snakefile --configfile $(BATCH) --cores $(CORES) --keep-going --rerun-incomplete --nolock

clean:
	rm -rf $(VENV) runs .snakemake
