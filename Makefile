# `make demo` and `make test` do all their own set-up on a fresh Debian 12:
# system packages, a virtual environment in .venv, and the package in it.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
LOWEST := build/lowest
CHECK := build/check

RUN_PACKAGES := libfuse3-dev pkg-config gcc libc6-dev fuse3
TEST_PACKAGES := xfsprogs btrfs-progs rsync e2fsprogs squashfs-tools erofs-utils fuse-overlayfs \
	qemu-system-x86 qemu-utils busybox-static cpio acl attr util-linux procps fio jq bmap-tools \
	systemd mandoc man-db bash zsh fish logrotate gdb curl
# The peers that only the benchmark wants; QEMU's comes with TEST_PACKAGES.
BENCH_PACKAGES := nbdkit libnbd-bin
PROFILE_PACKAGES := linux-perf
# What .ci/debian/control builds with, and what tries the package.
DEB_PACKAGES := build-essential dpkg-dev debhelper dh-python pybuild-plugin-pyproject python3 python3-click \
	python3-hatchling python3-markdown-it
TEST_DEB_PACKAGES := debootstrap lintian

.DELETE_ON_ERROR:
.PHONY: help demo check test test-lowest test-packages firecracker soak bench bench-quick deb lint clean \
	system-run-packages system-test-packages system-bench-packages system-deb-packages

help:
	@echo 'make demo   show the filesystem at work on a chain it makes itself, and leave that chain in'
	@echo '            build/demo, to try commands on'
	@echo 'make check  lint, type-check and run the unit tests: as any user, without FUSE and apt,'
	@echo '            in under two minutes'
	@echo 'make test   lint, type-check and test (as root: many tests mount file systems)'
	@echo '            one file: make test PYTEST_ARGS=tests/project/test_support.py'
	@echo 'make test-lowest  mount, flatten and restore with the lowest versions of what it needs'
	@echo 'make deb    build/diffmergefs_VERSION_all.deb, a package for Debian 12 and newer'
	@echo 'make test-packages  try that package in fresh roots of Debian 12 and 13 (as root; downloads)'
	@echo 'make firecracker  fetch Firecracker and its jailer into .cache/vm, as its tests do (x86-64)'
	@echo 'make soak   the fault tests and the fuzzing at their full counts (half an hour);'
	@echo '            writes what it saw to docs/reliability.md'
	@echo 'make bench  measure against peers, as root on a quiet machine (an hour); writes'
	@echo '            docs/benchmarks.md; parts: make bench BENCH_ARGS="--only sequential,random"'
	@echo 'make bench-quick  the same with small sizes, into build/bench-quick (some 3 minutes)'
	@echo 'make lint   lint and type-check only'
	@echo 'make clean  remove the virtual environment and the caches'

DEMO := build/demo

demo: $(VENV)/.stamp-run
	@! grep -q ' $(abspath $(DEMO))/' /proc/self/mounts || { echo '$(DEMO): something is mounted in it;' \
		'unmount it first: $(BIN)/diffmergefs umount $(DEMO)/views' >&2; exit 1; }
	@rm -rf '$(DEMO)'
	@$(BIN)/diffmergefs demo --keep '$(DEMO)'

# Run this before you send a change. It needs no root, no FUSE and no system package but Python.
check: $(CHECK)/.stamp
	@$(CHECK)/bin/ruff check
	@$(CHECK)/bin/ruff format --check --quiet
	@$(CHECK)/bin/mypy
	@$(CHECK)/bin/python -m pytest -m 'not fuse and not slow and not programs' tests/unit $(PYTEST_ARGS)

# pytest comes last, so that its summary is the end of the output.
test: $(VENV)/.stamp-test lint | system-test-packages
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# Each package with a lower bound in pyproject.toml is used. Old versions warn of much that cannot be
# mended here.
LOWEST_TESTS := $(addprefix tests/,mount/test_read.py mount/test_lifecycle.py mount/test_helper.py \
	vm/test_restore.py cli/test_completion.py cli/test_mistakes.py project/test_wheel.py) \
	$(addprefix tests/unit/,cli/test_usage.py cli/test_verbs.py fuse/test_operations.py fuse/test_readloop.py fuse/test_status.py \
	writing/test_flatten.py sidecars/test_bmap.py sidecars/test_bmapreader.py \
	pictures/test_map_picture.py pictures/test_extents_picture.py)

test-lowest: $(LOWEST)/.stamp | system-test-packages
	@$(LOWEST)/bin/python -m pytest -o filterwarnings=default --disable-warnings $(LOWEST_TESTS)

# Apart from `make test`: it takes minutes, and needs a mirror of Debian. A fixture takes longer than
# the time after which pytest prints a traceback.
test-packages: $(VENV)/.stamp-test | system-deb-packages
	@.ci/system-packages $(TEST_DEB_PACKAGES)
	@$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/packages $(PYTEST_ARGS)

# Tests and benchmarks fetch it themselves when they need it; here one learns why that fails.
firecracker: $(VENV)/.stamp-test
	@$(BIN)/python -m tests.vm.firecracker

# Without the traceback that pytest prints of a test which takes long, and without the debug lines
# of a hundred thousand inputs.
soak: $(VENV)/.stamp-test | system-test-packages
	@$(BIN)/python -m pytest --soak --soak-report docs/reliability.md \
		-o faulthandler_timeout=0 -o log_level=INFO tests/faults tests/fuzz tests/vm/test_firecracker_size.py \
		$(PYTEST_ARGS)

bench: $(VENV)/.stamp-bench | system-bench-packages
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

bench-quick: $(VENV)/.stamp-bench | system-bench-packages
	@$(BIN)/python -m tests.bench --scale quick $(BENCH_ARGS)

deb: | system-deb-packages
	@.ci/deb build

lint: $(VENV)/.stamp-test
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The packages are looked for in every run, which takes milliseconds; order-only,
# so that the virtual environment is not made anew for it.
system-run-packages:
	@.ci/system-packages $(RUN_PACKAGES)

system-test-packages: system-run-packages
	@.ci/system-packages $(TEST_PACKAGES)

system-deb-packages:
	@.ci/system-packages $(DEB_PACKAGES)

# A peer that cannot be had is told of in the results; the others are measured. perf comes apart:
# without it there is no profile, but the peers are there.
system-bench-packages: system-test-packages
	-@.ci/system-packages $(BENCH_PACKAGES)
	-@.ci/system-packages $(PROFILE_PACKAGES)

$(VENV)/.stamp-run: pyproject.toml | system-run-packages
	@.ci/venv $(PYTHON) $(VENV) --editable .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	@.ci/venv $(PYTHON) $(VENV) --editable '.[test]'
	@touch $@

$(CHECK)/.stamp: pyproject.toml .ci/check-venv .ci/venv
	@.ci/check-venv $(PYTHON) $(CHECK)
	@touch $@

$(LOWEST)/.stamp: pyproject.toml .ci/lowest .ci/lowest-venv | system-run-packages
	@.ci/lowest-venv $(PYTHON) $(LOWEST)
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-test
	@.ci/venv $(PYTHON) $(VENV) --editable '.[test,bench]'
	@touch $@
