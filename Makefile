# A fresh machine needs Python >= 3.11 and make. Everything is installed into .venv from setup.cfg and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
ROWS ?= recipes/assets/stories/train.jsonl
FAULTS := tests/faults tests/evaluation/test_resume.py tests/benchmarks

.PHONY: help quickstart test test-slow test-faults test-slurm bench experiments lint clean

help:
	@echo "make quickstart   install, then fine-tune, convert and score the embedded tiny model"
	@echo "make test         install, then run the tests"
	@echo "make test-slow    the tests that take minutes each: real data, other seeds, large checkpoints"
	@echo "make test-faults  100 of each fault on real ranks and on SLURM, an hour and a half; writes runs/faults.md, faults_slurm.md"
	@echo "make test-slurm   a real SLURM cluster on this machine, and mpirun; installed where root and apt are there"
	@echo "make bench        time, memory and traffic beside PEFT's and transformers', half an hour on two cores that do"
	@echo "                  nothing else; ROWS=gsm8k/train.jsonl packs these rows; writes benchmarks/results"
	@echo "make experiments  ABBA, LoRA and others at equal parameters: matrices, digits, and word problems for the tiny model;"
	@echo "                  tables and pictures to benchmarks/results; goes on where it was"
	@echo "make lint         ruff and the import rules"
	@echo "make clean        removes what make installed; runs/ stays"

# torch first and alone: a later resolution must not replace the build that suits this machine.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/quickstart.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -m "not slow and not slurm"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -m slow

test-faults: $(INSTALLED)
	mkdir -p runs
	tests/slurm/cluster.sh install
	ABBA_TRIALS=$${ABBA_TRIALS:-100} ABBA_TABLE=runs/faults.json $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(FAULTS)
	ABBA_TRIALS=$${ABBA_TRIALS:-100} ABBA_TABLE=runs/faults_slurm.json $(BIN)/python -m pytest tests/slurm/test_preemption.py

test-slurm: $(INSTALLED)
	tests/slurm/cluster.sh install
	$(BIN)/python -m pytest -m slurm

# On a GPU: benchmarks/gpu.py, eight minutes.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/layer.py --seconds 7
	$(BIN)/python benchmarks/step.py --seconds 10
	$(BIN)/python benchmarks/step.py --seconds 10 --name step_others --layers 1 --modes none --methods lora hira dora full abba
	$(BIN)/python benchmarks/load.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/packing.py --rows $(ROWS) --count 64 --repetitions 3
	$(BIN)/python benchmarks/scaling.py --layers 2 4

experiments: $(INSTALLED)
	$(BIN)/python benchmarks/reconstruction.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/compare.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf .venv build *.egg-info
