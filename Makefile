# hostimaged: `make demo` and `make test` are each enough alone on a fresh machine (see README.md).

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Every kind of message in both directions; the rest of tests/bus is about what is done with them.
OTHER_LIBRARY := tests/unit/dbus $(addprefix tests/bus/test_,transport.py contract.py hostile.py polkit.py properties.py)

.PHONY: help demo test test-container test-vm test-vm-full vm check bench fuzz soak clean

help:
	@echo 'make demo    private bus, scratch root, sample image: the whole job end to end'
	@echo 'make test    checks and all tests that can run on this machine'
	@echo 'make test-container boots a Debian 13 container: real systemd, logind, polkit, both buses'
	@echo 'make test-vm boots a Debian 13 guest for what needs its kernel (fs-verity, vfat)'
	@echo 'make test-vm-full boots guests for the rest: other boot loaders, old disks, soft reboot, podman, power cuts'
	@echo 'make vm      boots such a guest to play with, on this terminal'
	@echo 'make check   ruff, mypy, import contracts, unit file, bus policy'
	@echo 'make bench   benchmarks beside cfsctl, as ratios of medians'
	@echo 'make fuzz    coverage-guided fuzzing of the parsers [TARGET=tar] [SECONDS=600]'
	@echo 'make soak    the random campaigns in full'
	@echo 'make clean   remove the virtual environment and caches of this checkout'

$(STAMP): pyproject.toml
	@tests/setup/environment $(VENV)
	@touch $@

demo:
	@tests/setup/programs demo
	@$(MAKE) --no-print-directory $(STAMP)
	@$(BIN)/python tests/demo/run.py

test:
	@tests/setup/programs test
	@$(MAKE) --no-print-directory $(STAMP)
	@$(MAKE) --no-print-directory check
	@$(BIN)/pytest $(PYTEST_ARGS)
	@echo 'what speaks D-Bus once more, with the other library'
	@HOSTIMAGE_DBUS_LIBRARY=dbus-fast $(BIN)/pytest $(OTHER_LIBRARY)
	@tests/setup/programs summary

test-container:
	@tests/setup/programs container
	@$(MAKE) --no-print-directory $(STAMP)
	@$(BIN)/pytest -m container $(PYTEST_ARGS) tests/container

test-vm:
	@tests/setup/programs vm
	@$(MAKE) --no-print-directory $(STAMP)
	@tests/setup/guests $(BIN) $(PYTEST_ARGS)

test-vm-full:
	@HOSTIMAGE_VM_FULL=1 $(MAKE) --no-print-directory test-vm PYTEST_ARGS="--durations=0 $(PYTEST_ARGS)"

vm:
	@tests/setup/programs vm
	@$(MAKE) --no-print-directory $(STAMP)
	@PYTHONPATH=tests/support $(BIN)/python tests/vm/play.py

check: $(STAMP)
	@tests/setup/check $(BIN)

bench: $(STAMP)
	@PYTHONPATH=tests/support $(BIN)/python tests/bench/run.py $(BENCH_ARGS)

# With no TARGET: all of them, one after the other.
fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet -e '.[fuzz]'
	@PYTHONPATH=tests/support $(BIN)/python tests/fuzz/seeds.py $(TARGET)
	@nice -n 19 $(BIN)/python tests/fuzz/run.py fuzz $(TARGET) --seconds $(or $(SECONDS),600)

soak: $(STAMP)
	@HYPOTHESIS_PROFILE=soak HOSTIMAGE_SOAK=1 $(BIN)/pytest --timeout 1800 tests/property tests/fault $(PYTEST_ARGS)
	@for kind in dumps directories layers; do \
	    PYTHONPATH=tests/support $(BIN)/python tests/fuzz/differential.py $$kind --seed $$RANDOM || exit 1; done

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
