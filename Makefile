# make tour   see it all: install, run the notebooks, open runs/tour/index.html
# make test   unit and property tests, every notebook, style
# make lab    JupyterLab
#
# make saved    run the notebooks in place, as they are committed
# make results  sum up and draw the runs of data/results/runs
# make runs     make those runs again (three seeds, masked and unmasked)
# make ten-ways     the paper's ways to answer, trained and compared, three seeds
# make experiments  the paper's claims, thirteen experiments one after another (less than four hours; it resumes), and
#                   what they say; one alone: searchr1 experiment mask
# make tiny-base  pretrain the tiny model again
# make tiny-instruct  tune it to follow instructions again
#
# PYTHON=python3.12       another Python (3.11 or later)
# PIP_ARGS="..."          more arguments for every pip install, e.g. an index or a proxy of yours
# TORCH_INDEX=            on Linux without an NVIDIA card: take PyPI's torch (with CUDA) instead of PyTorch's CPU build

PYTHON ?= python3
PIP_ARGS ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PY := .venv/bin/python
SEARCHR1 := .venv/bin/searchr1
READY := .venv/.ready
NOTEBOOK_SECONDS ?= 600

.PHONY: tour test lab style notebooks saved runs results ten-ways experiments tiny-base tiny-instruct constraints
.DELETE_ON_ERROR:

tour: $(READY)
	$(SEARCHR1) tour

test: $(READY) style
	$(PY) -m pytest -q tests
	$(MAKE) notebooks

notebooks: $(READY)
	$(PY) -m pytest -q notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout=$(NOTEBOOK_SECONDS) \
	  --nbval-sanitize-with=tests/nbval_sanitize.cfg

style: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lab: $(READY)
	$(PY) -m jupyter lab notebooks

saved: $(READY)
	$(PY) -m jupyter execute --inplace notebooks/*.ipynb
	$(PY) -m nbstripout --keep-output --keep-count notebooks/*.ipynb

results: $(READY)
	$(SEARCHR1) report runs data/results/runs/* --out data/results/summary

runs: $(READY)
	for seed in 0 1 2; do for masked in true false; do \
	  name=$$([ $$masked = true ] && echo masked || echo unmasked); \
	  $(SEARCHR1) train --out data/results/runs/tiny-$$name-seed$$seed seed=$$seed masked=$$masked || exit 1; done; done

ten-ways: $(READY)
	$(SEARCHR1) experiment ten_ways
	$(SEARCHR1) report table runs/ten-ways --out data/results/ten_ways

experiments: $(READY)
	$(SEARCHR1) experiment all
	$(SEARCHR1) report findings data/results/experiments/*.json --out data/results/findings

PRETRAIN := .venv/bin/torchrun --nproc-per-node 2 data/tiny-base/pretrain.py
tiny-base: export OMP_NUM_THREADS = 1
tiny-base: $(READY)
	$(PRETRAIN) --out data/cache/tiny-base-1 --practice --steps 3200 --stop 2000
	$(PRETRAIN) --weights data/cache/tiny-base-1 --out data/cache/tiny-base-2 --practice --seed 1 --steps 1100 \
	  --learning-rate 3e-3 --hold 0 --drills-only 0 --drill-share 0.5 --short-prompt 0.45
	$(PRETRAIN) --weights data/cache/tiny-base-2 --out data/tiny-base --seed 2 --steps 220 \
	  --learning-rate 1e-3 --hold 0 --drills-only 0 --drill-share 0.2 --short-prompt 0
	$(PY) data/tiny-base/measure.py --out data/tiny-base/measured.json

tiny-instruct: export OMP_NUM_THREADS = 1
tiny-instruct: $(READY)
	.venv/bin/torchrun --nproc-per-node 2 data/tiny-instruct/instructions.py --out data/tiny-instruct
	$(PY) data/tiny-base/measure.py --model data/tiny-instruct --out data/tiny-instruct/measured.json

# On Linux, PyPI's torch brings several GB of CUDA: without an NVIDIA card, PyTorch's own index of CPU builds is asked
# too, where it can be reached. Other systems get a CPU build from PyPI.
CPU_TORCH = $$([ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
  && curl -fsI -m 5 -o /dev/null "$(TORCH_INDEX)/torch/" 2>/dev/null && echo "--extra-index-url $(TORCH_INDEX)")

# Made once, and brought up to date when a version changes. torch goes first, so that the choice of its build is made
# here and nothing that needs torch replaces it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, and $(PYTHON) is " \
	  + sys.version.split()[0] + "; name another one: make PYTHON=python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install $(PIP_ARGS) $(CPU_TORCH) --constraint constraints.txt torch
	$(PY) -m pip install $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

constraints: $(READY)
	@{ sed -n '/^#/p' constraints.txt; $(PY) -m pip freeze --exclude-editable | sed -n 's/^\([^ @]*==[^+]*\).*/\1/p' \
	  | grep -Evi '^(pip|setuptools|coverage)=='; } > .venv/constraints.txt && mv .venv/constraints.txt constraints.txt
