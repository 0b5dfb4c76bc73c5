# make demo and make test do all set-up themselves.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
S3_STAMP := .venv-s3/.installed
export RAY_USAGE_STATS_ENABLED := 0
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

.PHONY: install demo test test-all unit check format bench clean

install: $(STAMP)

$(STAMP): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "segbatch needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[cpu,dev,hf,litert,onnx,otel,pretrained,smp]'
	@touch $@

# The S3 test server needs a botocore that s3fs refuses, so it lives in an environment of its own.
$(S3_STAMP): tests/s3-server.txt
	test -x .venv-s3/bin/python || $(PYTHON) -m venv .venv-s3
	.venv-s3/bin/python -m pip install --quiet --requirement tests/s3-server.txt
	@touch $@

demo: install
	$(BIN)/segbatch demo demo-out

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Thousands of small files: in memory where there is room for them.
RAM := $(shell test "$$(df -m --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 2000 2>/dev/null && echo TMPDIR=/dev/shm)
PARALLEL := $(RAM) $(BIN)/pytest --numprocesses auto
SERVERS := ray or flows or s3

unit: install
	$(PARALLEL) tests/unit tests/contract tests/golden -m "not ($(SERVERS) or slow or long)" --hypothesis-profile quick

# First what needs no server; then two processes, one with Ray for all its tests, one with Prefect and S3 for theirs.
WITH_SERVERS := $(BIN)/pytest --numprocesses 2 --dist loadgroup tests/flows tests/integration tests/contract
test: install $(S3_STAMP)
	$(PARALLEL) tests -m "not ($(SERVERS) or slow)"
	$(WITH_SERVERS) -m "($(SERVERS)) and not slow"

test-all: install $(S3_STAMP)
	$(PARALLEL) --dist worksteal tests -m "not ($(SERVERS))"
	$(WITH_SERVERS) -m "$(SERVERS)"

bench: install
	$(BIN)/python tests/bench/run.py

clean:
	rm -rf .venv .venv-s3 demo-out build *.egg-info
