# Forebay: `make demo` shows it, `make test` proves it.

# Build output may lie outside the checkout: set CARGO_TARGET_DIR.
TARGET := $(or $(CARGO_TARGET_DIR),$(shell cargo metadata --no-deps --format-version 1 2>/dev/null | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'),target)
PORT ?= 8080
ADMIN_PORT ?= 8081
ONCE ?=

.PHONY: help demo test test-vllm bench model build lint fmt unit check

help: ## Show this list.
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: model ## Build, fetch the model, serve it with four engines and show what happens. ONCE=1 stops afterwards.
	cargo build --release --locked --bin forebay
	python3 scripts/demo.py --binary $(TARGET)/release/forebay --port $(PORT) --admin-port $(ADMIN_PORT) $(if $(ONCE),--once)

test: model ## Everything that continuous integration runs.
	@scripts/fetch-pyzmq.sh
	@scripts/fetch-tokenizers.sh >/dev/null
	scripts/test.sh

test-vllm: model ## Real vLLM, end to end: installs it (6.5 GB) the first time, then some ten minutes.
	scripts/vllm/install.sh
	cargo build --release --locked --bin forebay --bin testkit
	python3 tests/vllm/run.py --binary $(TARGET)/release/forebay --testkit $(TARGET)/release/testkit

bench: ## The benchmarks that need no other program; see bench/README.md for the rest.
	cargo build --release --locked --bin forebay
	python3 bench/idle.py --binary $(TARGET)/release/forebay
	python3 bench/front.py --only short,added --binary $(TARGET)/release/forebay

model:
	@scripts/setup.sh
	@scripts/fetch-model.sh >/dev/null

lint: ## Formatting, lints, dependency direction, licences.
	scripts/test.sh lint

fmt: ## Format the code.
	cargo fmt --all
