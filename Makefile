# Two commands do everything on a machine that has only a Rust toolchain (and make): `make run`, `make test`.

PORT ?= 8080

# Seconds and seed of `make schema`; a seed shows the same again.
SECONDS ?= 600
SEED ?=

.PHONY: help run test schema measure setup-build setup-test

help:
	@echo 'make run          build and start `infra-controller dev` on port $(PORT) (PORT=… for another)'
	@echo 'make test         all checks and tests, as CI runs them'
	@echo 'make schema       requests of all kinds, made of openapi.json, for SECONDS=$(SECONDS) against each backend (SEED=…)'
	@echo 'make measure      requests/s and CPU a request of one node, on this machine'
	@echo 'make setup-build  only install what the build needs'
	@echo 'make setup-test   only install what the tests need'

run: setup-build
	cargo run --release --locked -- dev --port $(PORT)

test: setup-build setup-test
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo check --locked --no-default-features
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items
	cargo test --locked

schema: setup-build setup-test
	@seed=$(or $(SEED),$$(date +%s)); echo "SECONDS=$(SECONDS) SEED=$$seed"; \
	SCHEMA_SECONDS=$(SECONDS) SCHEMA_SEED=$$seed cargo test --locked --test it schema::

measure: setup-build setup-test
	@scripts/setup.sh measure
	cargo build --release --locked
	.venv-test/bin/python loadtest/measure.py

setup-build:
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh test
