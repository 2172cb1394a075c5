# Every target does the set-up that it needs: on a fresh Debian, `make run` and `make test` start from nothing.
# What takes long is kept below build/ and .venv/ and made again only when what it is made from has changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Where this is set, every start of a program would compile again what it imports.
unexport PYTHONDONTWRITEBYTECODE

# The distribution's interpreter, not the first one in PATH: version managers put others there, and the guest is
# built from the distribution's Python as well.
SYSTEM_PYTHON := /usr/bin/python3
VENV          := .venv
PYTHON        := $(VENV)/bin/python
BUILD         := build
GUEST         := $(BUILD)/guest/manifest.json
ROOT_IMAGES   := $(BUILD)/guest-ext4/manifest.json $(BUILD)/guest-erofs/manifest.json
IMAGE         := $(BUILD)/busybox.tar
# Guests and images of other architectures than the host's, for tests; named as Debian and containerd name these.
FOREIGN       := $(foreach arch,arm64 s390x,$(BUILD)/foreign/$(arch)/manifest.json $(BUILD)/foreign/$(arch)/busybox.tar)
ROOT_IMAGE_arm64 := --image erofs --verity
# The machine in which tests/node runs other tests.
NODE          := $(BUILD)/node/initrd.img
LAUNCHERS     := $(BUILD)/bin/containerd-shim-kata-py-v2
PACKAGES      := netlink oci_engine ttrpc config agent_proto hypervisor shim guest_agent guest_image cli runk
TESTS         ?= tests
PYTEST_ARGS   ?=
BENCH_ARGS    ?=

PREFIX        ?= /usr/local
DESTDIR       ?=

# What ends up in the guest, or decides how it is made.
GUEST_SOURCES := $(shell find guest_agent guest_image agent_proto netlink oci_engine ttrpc -type f \
                   -not -name '*.pyc' -not -name '*.md' 2>/dev/null)

.PHONY: help setup venv venv-dev launchers guest root-images image foreign node run stop clean check lint types layers fresh \
        test test-matrix unit bench protos golden install uninstall

help: ## List the targets.
	@printf 'kata-py: boots every pod in its own QEMU microVM\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: TESTS=path PYTEST_ARGS=... (make test), BENCH_ARGS=... (make bench), PREFIX=%s DESTDIR= (make install)\n' '$(PREFIX)'

run: setup launchers guest image ## Set everything up and run a container in a microVM.
	@$(SYSTEM_PYTHON) packaging/demo.py run

stop: ## Stop the private containerd that `make run` started, with its containers.
	@$(SYSTEM_PYTHON) packaging/demo.py stop

clean: ## Stop, and remove everything that was made: build/, .venv/, caches, state.
	@$(SYSTEM_PYTHON) packaging/demo.py clean
	rm -rf $(BUILD) $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: ## Install missing Debian packages.
	@packaging/setup.sh

# --- Python -----------------------------------------------------------------------------------------------------

venv: $(VENV)/.run ## Make .venv with what running needs.
venv-dev: $(VENV)/.dev ## Add what checking and testing need.

$(VENV)/.run: pyproject.toml packaging/python_env.py | setup
	@$(SYSTEM_PYTHON) packaging/python_env.py $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(SYSTEM_PYTHON) packaging/python_env.py --dev $(VENV)
	@touch $@

launchers: $(LAUNCHERS) ## Write the programs that containerd and you call, into build/bin.

$(LAUNCHERS): packaging/launcher.py $(VENV)/.run
	@$(PYTHON) packaging/launcher.py $(BUILD)/bin
	@touch $@

# --- What runs in the microVM -----------------------------------------------------------------------------------

guest: $(GUEST) ## Build the guest kernel and initrd from Debian's packages.

$(GUEST): $(GUEST_SOURCES) $(LAUNCHERS)
	@XDG_CACHE_HOME=$(abspath $(BUILD)/cache) $(BUILD)/bin/kata-py guest build --output $(BUILD)/guest
	@touch $@

root-images: $(ROOT_IMAGES) ## Build the guest as root images too, which some tests boot.

$(ROOT_IMAGES): $(BUILD)/guest-%/manifest.json: $(GUEST_SOURCES) $(LAUNCHERS)
	@XDG_CACHE_HOME=$(abspath $(BUILD)/cache) $(BUILD)/bin/kata-py guest build --image $* --verity \
	  --output $(BUILD)/guest-$*
	@touch $@

image: $(IMAGE) ## Build the small container image that demo and tests use.

$(IMAGE): packaging/busybox_image.py | setup
	@$(SYSTEM_PYTHON) packaging/busybox_image.py $@

foreign: $(FOREIGN) ## Build guests and images for arm64 and s390x, for the tests.

$(BUILD)/foreign/%/manifest.json: $(GUEST_SOURCES) $(LAUNCHERS)
	@XDG_CACHE_HOME=$(abspath $(BUILD)/cache) $(BUILD)/bin/kata-py guest build --arch $* $(ROOT_IMAGE_$*) --output $(@D)
	@touch $@

$(BUILD)/foreign/%/busybox.tar: packaging/foreign_image.py packaging/busybox_image.py $(VENV)/.run | setup
	@$(PYTHON) packaging/foreign_image.py $* $(@D)
	@touch $@

node: $(NODE) ## Build kernel and initrd of the Debian machine that tests/node boots.

$(NODE): packaging/debian_node.py guest_image/apt.py guest_image/cpio.py guest_image/kernel.py $(VENV)/.run | setup
	@$(PYTHON) packaging/debian_node.py $(@D)
	@touch $@

# --- Checks and tests -------------------------------------------------------------------------------------------

check: lint types layers fresh ## Format, lint, types, layers, generated files.

lint: venv-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

# packaging/ holds scripts that import each other by plain names; as a package it would hide the one on PyPI.
types: venv-dev
	MYPYPATH=packaging $(VENV)/bin/mypy --explicit-package-bases $(PACKAGES) tests bench packaging

layers: venv-dev
	PYTHONPATH=. $(VENV)/bin/lint-imports

fresh: venv-dev
	$(PYTHON) packaging/protos.py --check
	$(PYTHON) packaging/config_reference.py --check

# Two runs: the integration tests adopt every process that containerd orphans, and the agent's tests reap every child
# there is. Status 5 is "nothing selected", which TESTS=path may well lead to in one of them.
test: check launchers guest root-images image foreign node ## All checks and all tests, with real virtual machines and a real containerd.
	@packaging/setup.sh tests
	@$(PYTHON) packaging/qemu_versions.py fetch
	KATA_PY_TEST_ALL_QEMUS=1 $(PYTHON) -m pytest -m 'not integration' $(PYTEST_ARGS) $(TESTS) || [ $$? -eq 5 ]
	$(PYTHON) packaging/containerd_versions.py test --short $(PYTEST_ARGS) $(TESTS)

test-matrix: launchers guest root-images image foreign venv-dev ## All integration tests with each containerd that Debian has: 1.6, 1.7, 2.x.
	$(PYTHON) packaging/containerd_versions.py test $(PYTEST_ARGS) $(TESTS)

unit: venv-dev ## The tests that need no virtual machine.
	$(PYTHON) -m pytest -m 'not vm and not integration' $(PYTEST_ARGS) $(TESTS)

bench: launchers guest image venv-dev ## Measure starts, phase by phase.
	@packaging/setup.sh bench
	XDG_CACHE_HOME=$(abspath $(BUILD)/cache) $(PYTHON) -m bench $(BENCH_ARGS)

protos: venv-dev ## Generate the message classes anew from the .proto files.
	$(PYTHON) packaging/protos.py

golden: venv-dev ## Rewrite the expected QEMU command lines; review the difference.
	GOLDEN_REWRITE=1 $(PYTHON) -m pytest -q tests/unit -k golden

# --- Installation -----------------------------------------------------------------------------------------------

install: guest ## Install below PREFIX, with the guest and a first configuration.
	@$(SYSTEM_PYTHON) packaging/install.py install --prefix '$(PREFIX)' --destdir '$(DESTDIR)'

uninstall: ## Remove exactly what `make install` put there, and the shim's cache.
	@$(SYSTEM_PYTHON) packaging/install.py uninstall --prefix '$(PREFIX)' --destdir '$(DESTDIR)'
