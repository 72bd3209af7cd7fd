# One list of tasks; CI runs the same ones. `make help` prints it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := .venv-torch
# What a built module depends on.
RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml 2>/dev/null) Cargo.toml Cargo.lock
# What a released file depends on.
SOURCES := $(RUST_SOURCES) $(shell find python service -name '*.py' -o -name '*.pyi' 2>/dev/null) README.md
step = @printf '\n\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: requirements
requirements:
	@command -v cargo >/dev/null || { echo "missing: a Rust toolchain (cargo), see https://rustup.rs" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON); name another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "missing: Python 3.11 or later ($(PYTHON) is $$($(PYTHON) -V 2>&1)); name another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "missing: Python's venv module (on Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "missing: a C linker (cc), which Rust needs (on Debian and Ubuntu: the package gcc)" >&2; exit 1; }

$(VENV)/.packages: tests/requirements.txt tests/constraints.txt | requirements
	$(call step,Installing Python packages into $(VENV))
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt -c tests/constraints.txt
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(RUST_SOURCES) pyproject.toml service/pyproject.toml
	$(call step,Building the Rust core and installing both distributions)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c tests/constraints.txt -e . -e ./service
	@touch $@

.PHONY: setup
setup: $(VENV)/.built ## Create .venv with both distributions and all that the tests need

.PHONY: demo
demo: setup ## Train, freeze, export and serve a network on real data (writes demo-output/)
	$(call step,Running the demonstration)
	@$(BIN)/batchnorm demo --output demo-output

.PHONY: format
format: setup ## Format Rust and Python, and write the docstrings of the module into its stub
	@cargo fmt --all
	@$(BIN)/ruff check --quiet --fix .
	@PYTHONPATH=tests $(BIN)/python -m stub
	@$(BIN)/ruff format --quiet .

.PHONY: lint
lint: setup ## Formatting, lints, types, and the stub against the compiled module
	$(call step,Lint: cargo fmt and clippy)
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(call step,Lint: ruff)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	$(call step,Lint: mypy and stubtest)
	@$(BIN)/mypy
	@$(BIN)/mypy --strict tests/stub.py tests/lowest.py tests/check_dist.py tests/check_links.py
	@$(BIN)/mypy --config-file tests/mypy.ini tests --exclude tests/service/
	@$(BIN)/mypy --config-file tests/mypy.ini tests/service
	@$(BIN)/python -m mypy.stubtest batchnorm._core --concise

.PHONY: test-rust
test-rust: requirements ## The core's own tests, without Python
	$(call step,Testing the Rust core)
	@cargo test -p batchnorm -p batchnorm-json --locked --quiet

# Both take minutes, mostly on one core each.
.PHONY: built
built: requirements
	@$(MAKE) --no-print-directory -j2 setup compiled-tests

.PHONY: compiled-tests
compiled-tests: requirements
	$(call step,Compiling the tests of the Rust crates)
	@cargo test -p batchnorm -p batchnorm-json --locked --quiet --no-run

.PHONY: bench-rust
bench-rust: requirements
	$(call step,Running each verb of the micro-benchmark once)
	@cargo test -p batchnorm --locked --quiet --bench verbs

.PHONY: test
test: built ## All tests except the long ones (needs no root)
	$(call step,Testing: the output of each part follows when it is done)
	@$(MAKE) --no-print-directory -j2 --output-sync=target pytest-core pytest-files pytest-service test-rust

# What works with files and processes; two halves, since a half of the Python tests takes one core.
FILES := tests/test_cli*.py tests/test_demo*.py tests/test_onnx*.py

.PHONY: pytest-core
pytest-core: setup
	$(call step,Testing Python)
	@$(BIN)/python -m pytest -q -m 'not long' --durations=5 tests --ignore tests/service $(FILES:%=--ignore-glob '%')

.PHONY: pytest-files
pytest-files: setup
	$(call step,Testing the command line and ONNX)
	@$(BIN)/python -m pytest -q -m 'not long' --durations=5 $(FILES)

.PHONY: pytest-service
pytest-service: setup
	$(call step,Testing the service)
	@$(BIN)/python -m pytest -q -m 'not long' --durations=5 tests/service

.PHONY: pytest
pytest: setup ## Some Python tests: make pytest ARGS='tests/test_infer.py -k oracle'
	@$(BIN)/python -m pytest -q $(ARGS)

# Everything is installed before the parts run side by side, since they share .venv. Speed is checked alone.
.PHONY: test-all
test-all: test bench-rust $(VENV)/.docs $(VENV)/.release $(VENV)/.trained $(TORCH)/.packages ## All tests, including those that take long or need system packages
	$(call step,Testing the rest: the output of each part follows when it is done)
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-long memcheck lint-torch test-torch docs dist
	@$(MAKE) --no-print-directory bench-check

.PHONY: test-long
test-long: setup $(VENV)/.trained
	$(call step,Testing the long forms)
	@cargo test -p batchnorm-json --locked --quiet --test fuzz -- --ignored --show-output
	@$(BIN)/python -m pytest -q -m long --durations=5

$(VENV)/.trained: $(VENV)/.packages tests/requirements-trained.txt
	$(call step,Installing a trained model)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r tests/requirements-trained.txt
	@touch $@

$(VENV)/.peers: $(VENV)/.packages tests/requirements-peers.txt tests/constraints-peers.txt
	$(call step,Installing the peers to compare with)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements-peers.txt \
	  -c tests/constraints.txt -c tests/constraints-peers.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.packages tests/requirements-docs.txt
	$(call step,Installing what builds the documentation)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements-docs.txt -c tests/constraints.txt
	@touch $@

.PHONY: docs
docs: setup $(VENV)/.docs ## Build the HTML documentation, warnings and dead links being errors (writes docs-output/)
	$(call step,Documentation of the Rust crate)
	@RUSTDOCFLAGS='-D warnings' cargo doc -p batchnorm -p batchnorm-json --no-deps --locked --quiet
	$(call step,Documentation as HTML)
	@rm -rf docs-output
	@$(BIN)/python -m sphinx -q -W --keep-going -d docs-output/.doctrees docs docs-output/html
	@cp -r target/doc docs-output/html/rust
	@$(BIN)/python tests/check_links.py docs-output/html
	@echo "docs-output/html/index.html"

$(VENV)/.release: $(VENV)/.packages tests/requirements-release.txt
	$(call step,Installing what makes a release)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements-release.txt -c tests/constraints.txt
	@touch $@

dist/.checked: $(VENV)/.built $(VENV)/.release $(SOURCES)
	$(call step,Building and checking what is released)
	@rm -rf dist
	@# The wheel is built from the sdist's own sources, but with the dependencies that are compiled already.
	@CARGO_TARGET_DIR=$(CURDIR)/target $(BIN)/python -m maturin build --release --quiet --compatibility pypi --sdist --out dist
	@cd service && ../$(BIN)/python -m hatchling build -d ../dist >/dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python -m abi3audit --strict dist/batchnorm-*.whl
	@$(BIN)/python tests/check_dist.py dist
	@touch $@

.PHONY: dist
dist: dist/.checked ## Build and check sdists and wheels of both distributions (writes dist/)

.PHONY: lowest
lowest: $(VENV)/.release ## Resolve the lowest versions of all dependencies again (writes tests/constraints-lowest.txt)
	@$(BIN)/python tests/lowest.py

.venv-lowest/.packages: tests/constraints-lowest.txt
	$(call step,Installing every dependency at its declared floor)
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/constraints-lowest.txt
	@touch $@

.PHONY: test-lowest
test-lowest: dist ## The quick tests with every dependency at its lowest version (needs Python 3.11)
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then $(MAKE) --no-print-directory tested-lowest; \
	else echo "skipped: $(PYTHON) is not Python 3.11, the lowest that we support; name it with make PYTHON=..."; fi

# Old packages may give deprecation warnings, which are not errors of this project.
.PHONY: tested-lowest
tested-lowest: .venv-lowest/.packages
	$(call step,Testing with every dependency at its declared floor)
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	@.venv-lowest/bin/python -m pytest -q -m 'not long' -o filterwarnings=default --disable-warnings

# The package itself is the one that `setup` builds: a path file leads to it.
$(TORCH)/.packages: tests/requirements-torch.txt tests/constraints.txt tests/constraints-torch.txt | requirements
	@command -v c++ >/dev/null || { echo "missing: a C++ compiler (c++), which torch.compile needs (on Debian and Ubuntu: the package g++)" >&2; exit 1; }
	$(call step,Installing PyTorch into $(TORCH): several GB)
	@$(PYTHON) -m venv $(TORCH)
	@$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements-torch.txt \
	  -c tests/constraints.txt -c tests/constraints-torch.txt
	@printf '%s\n' "$(CURDIR)/python" "$(CURDIR)/service" \
	  >"$$($(TORCH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/batchnorm.pth"
	@touch $@

.PHONY: lint-torch
lint-torch: setup $(TORCH)/.packages ## Types of batchnorm.torch against PyTorch's own
	$(call step,Lint: mypy with PyTorch)
	@$(TORCH)/bin/mypy --cache-dir .mypy_cache/torch $$(find python/batchnorm/torch -name '*.py')

.PHONY: test-torch
test-torch: setup $(TORCH)/.packages ## Tests that need PyTorch, in .venv-torch (ARGS='-k layers' for some)
	$(call step,Testing with PyTorch)
	@$(TORCH)/bin/python -m pytest -q --durations=5 tests/pytorch tests/test_foreign_arrays.py $(ARGS)

.PHONY: memcheck
memcheck: requirements ## The core's tests of every width under Valgrind (skipped if that is not installed)
	$(call step,Checking the memory of the Rust core with Valgrind)
	@if command -v valgrind >/dev/null; then \
	  runner='valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite'; \
	  config="target.'cfg(all())'.runner='$$runner'"; \
	  cargo --config "$$config" test -p batchnorm --locked --quiet --test contract -- --show-output widths::; \
	  cargo --config "$$config" test -p batchnorm --locked --quiet --lib -- --skip flushes_to_zero --skip is_leaked; \
	else echo "skipped: no valgrind (on Debian and Ubuntu: the package valgrind)"; fi

.PHONY: bench
bench: setup $(VENV)/.peers $(TORCH)/.packages ## Time this package, a plain copy and other libraries (updates docs/performance.md; ONLY=56x56 for a part, THREADS=1, RUNS=3)
	@BENCH_TORCH=$(TORCH)/bin/python PYTHONPATH=tests $(BIN)/python -m bench $(if $(ONLY),--only "$(ONLY)") \
	  $(if $(THREADS),--threads "$(THREADS)") $(if $(RUNS),--runs "$(RUNS)") docs/performance.md

.PHONY: bench-check
bench-check: setup ## Fail if a pass takes far longer than its goal, as a multiple of a plain copy, or than NumPy
	$(call step,Checking speed against the floor of a copy and against NumPy)
	@PYTHONPATH=tests $(BIN)/python -m bench.check

.PHONY: accuracy
accuracy: setup $(VENV)/.peers ## Print errors against extended precision, ours and other libraries' (updates docs/accuracy.md)
	@PYTHONPATH=tests $(BIN)/python -m accuracy docs/accuracy.md

.PHONY: bench-service
bench-service: setup ## Time the service and other servers over HTTP (needs wrk; writes bench-output/; ONLY=JSON for a part, ROUNDS=5)
	@PYTHONPATH=tests $(BIN)/python -m bench_service $(if $(ONLY),--only "$(ONLY)") $(if $(ROUNDS),--rounds "$(ROUNDS)")

.PHONY: bench-network
bench-network: setup $(TORCH)/.packages ## Time whole networks with PyTorch's layers and with ours (writes bench-output/; ONLY=resnet18, ROUNDS=15, EAGER=1: not compiled)
	@PYTHONPATH=tests $(TORCH)/bin/python -m bench_network $(if $(ONLY),--only "$(ONLY)") $(if $(ROUNDS),--rounds "$(ROUNDS)") \
	  $(if $(EAGER),--variant ours --variant "ours fused") $(if $(QUICK),--quick) docs/pytorch.md

.PHONY: bench-whitening
bench-whitening: setup ## Time whitening beside batch norm and other libraries (updates docs/whitening.md; MOST=256: no more channels, ROUNDS=3)
	@PYTHONPATH=tests $(BIN)/python -m bench_whitening $(if $(MOST),--most "$(MOST)") $(if $(ROUNDS),--rounds "$(ROUNDS)") docs/whitening.md

.PHONY: bench-fold
bench-fold: setup ## Time networks in ONNX Runtime with their batch norms and with them folded (updates docs/folding.md)
	@PYTHONPATH=tests $(BIN)/python -m bench_fold docs/folding.md

.PHONY: onnx-runtimes
onnx-runtimes: setup ## Run every export in ONNX Runtime and OpenVINO (updates the table of docs/onnx.md)
	@$(BIN)/python tests/onnx_runtimes.py docs/onnx.md

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(VENV) .venv-kserve .venv-lowest .venv-mlserver $(TORCH) .venv-triton target dist demo-output bench-output docs-output
