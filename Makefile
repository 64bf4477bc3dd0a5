# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two torch processes on one machine otherwise spend their time waiting for each other at full speed.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test check clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

demo: install  ## train on generated shapes, evaluate, draw figures, load the checkpoint back
	rm -rf outputs/demo
	$(BIN)/python -m datasets_scripts.shapes --output outputs/shapes --overwrite
	$(BIN)/python train_msee.py configuration/demo.yaml
	$(BIN)/msee figures outputs/demo --data outputs/shapes --split validation --count 8 --output outputs/demo/figures
	$(BIN)/python examples/use_checkpoint.py outputs/demo outputs/shapes

test: install  ## the default suite, offline, under five minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs build *.egg-info
