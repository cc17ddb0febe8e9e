# `make demo` and `make test` do all their own set-up on a fresh Debian 12:
# system packages, a virtual environment in .venv, and the package in it.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

RUN_PACKAGES := libfuse3-dev pkg-config gcc libc6-dev fuse3
TEST_PACKAGES := xfsprogs btrfs-progs e2fsprogs qemu-system-x86 qemu-utils \
	busybox-static cpio acl attr util-linux procps fio jq bmap-tools

.DELETE_ON_ERROR:
.PHONY: help demo test soak lint clean run-packages test-packages

help:
	@echo 'make demo   show the filesystem at work on a chain it makes itself'
	@echo 'make test   lint, type-check and test (as root: many tests mount file systems)'
	@echo '            one file: make test PYTEST_ARGS=tests/test_support.py'
	@echo 'make soak   the fault tests and the fuzzing at their full counts (half an hour);'
	@echo '            writes what it saw to docs/reliability.md'
	@echo 'make lint   lint and type-check only'
	@echo 'make clean  remove the virtual environment and the caches'

demo: $(VENV)/.stamp-run
	@$(BIN)/diffmergefs demo

# pytest comes last, so that its summary is the end of the output.
test: $(VENV)/.stamp-test lint | test-packages
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# Without the traceback that pytest prints of a test which takes long, and without the debug lines
# of a hundred thousand inputs.
soak: $(VENV)/.stamp-test | test-packages
	@$(BIN)/python -m pytest --soak --soak-report docs/reliability.md \
		-o faulthandler_timeout=0 -o log_level=INFO tests/faults $(wildcard tests/test_fuzz*.py) \
		$(PYTEST_ARGS)

lint: $(VENV)/.stamp-test
	@$(BIN)/ruff check
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The packages are looked for in every run, which takes milliseconds; order-only,
# so that the virtual environment is not made anew for it.
run-packages:
	@.ci/system-packages $(RUN_PACKAGES)

test-packages: run-packages
	@.ci/system-packages $(TEST_PACKAGES)

$(VENV)/.stamp-run: pyproject.toml | run-packages
	@.ci/venv $(PYTHON) $(VENV) --editable .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	@.ci/venv $(PYTHON) $(VENV) --editable '.[test]'
	@touch $@
