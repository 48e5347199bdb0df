# `make demo` runs the whole pipeline, or what of it has not finished yet (rm -r runs/demo: all of it anew); `make test`
# the tests. Both make .venv first, if it is not there.
# `make test-vllm` tests --sampler vllm with the real vLLM, in an environment of its own.
PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
TEST_JOBS ?= 2
BIN := $(abspath $(VENV))/bin

.PHONY: demo test test-vllm photos bugs chaos exercise lint bench
demo: $(VENV)/ready
	PATH="$(BIN):$$PATH" bash recipes/demo.sh runs/demo

# two files of tests at a time, one thread each, in the order of their names: the long ones are not the last
test: $(VENV)/ready
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

# an environment of its own (several GB) with vLLM's CPU build; then about three minutes
test-vllm:
	PYTHON="$(PYTHON)" bash tests/vllm/setup.sh $(VENV_VLLM)
	OMP_NUM_THREADS=1 $(abspath $(VENV_VLLM))/bin/python -m pytest tests/vllm

photos: $(VENV)/ready
	PATH="$(BIN):$$PATH" bash recipes/photos.sh runs/photos

bugs: $(VENV)/ready
	PATH="$(BIN):$$PATH" python tests/plant_bugs.py

# real runs are killed and damaged at random moments, resumed, and compared; an hour or so on two cores.
# With vLLM's runs: make chaos VLLM=.venv-vllm/bin/python. Another order and other moments: SEED=1
SEED ?= 0
chaos: $(VENV)/ready
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 PYTHONPATH=. python tests/chaos.py --seed $(SEED) --kills 200 \
		--log bench/results/chaos.jsonl $(if $(VLLM),--vllm-python $(abspath $(VLLM))); status=$$?; \
		PATH="$(BIN):$$PATH" python bench/reliability.py && exit $$status

# make exercise: the list; N=12: find bug 12 in exercises/12; N=12 SHOW=1: tells it
exercise: $(VENV)/ready
	@PATH="$(BIN):$$PATH" python tests/exercises.py $(N) $(if $(SHOW),--show)

# an environment of its own (several GB) with the libraries we compare with, then an hour of turns on two cores
bench:
	bash bench/setup.sh .venv-bench
	.venv-bench/bin/python bench/versus.py
	.venv-bench/bin/python bench/readme.py

lint: $(VENV)/ready
	PATH="$(BIN):$$PATH" ruff check .

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@
