# Two commands do everything on a machine that has only a Rust toolchain (and make): `make run`, `make test`.

PORT ?= 8080

# Rounds of `make loadtest` and seconds of each of their runs; QUICK=1: one short round, to see that all works.
ROUNDS ?= 5
SECONDS_EACH ?= 8
QUICK ?=

# Seconds of `make schema`, and of each target of `make fuzz`; seed of these and `make chaos`; a seed shows the same again.
SECONDS ?= 600
SEED ?=

# Most tests wait for leases and deadlines, and compute little.
TEST_THREADS ?= $(shell expr 2 '*' $$(nproc))

.PHONY: help run test bench schema fuzz chaos slow loadtest setup-build setup-test

help:
	@echo 'make run          build and start `infra-controller dev` on port $(PORT) (PORT=… for another)'
	@echo 'make test         all checks and tests, as CI runs them'
	@echo 'make bench        what a request costs, piece by piece (criterion)'
	@echo 'make schema       requests of all kinds, made of openapi.json, for SECONDS=$(SECONDS) against each backend (SEED=…)'
	@echo 'make fuzz         whatever reads what comes from outside, for SECONDS=$(SECONDS) each, all at once (SEED=…)'
	@echo 'make slow         clients that are slow on purpose beside one that is not (slowhttptest)'
	@echo 'make chaos        every fault under load, again and again and with outages of up to a minute (SEED=…)'
	@echo 'make loadtest     what a run costs beside bare Pingora, and whether it holds under load (QUICK=1, ROUNDS=…, SECONDS_EACH=…)'
	@echo 'make setup-build  only install what the build needs'
	@echo 'make setup-test   only install what the tests need'

run: setup-build
	cargo run --release --locked -- dev --port $(PORT)

bench: setup-build
	cargo bench --locked --bench request

test: setup-build setup-test
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo check --locked --no-default-features
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items
	RUST_TEST_THREADS=$(TEST_THREADS) cargo test --locked
	scripts/deny.sh

schema: setup-build setup-test
	@seed=$(or $(SEED),$$(date +%s)); echo "SECONDS=$(SECONDS) SEED=$$seed"; \
	SCHEMA_SECONDS=$(SECONDS) SCHEMA_SEED=$$seed cargo test --locked --test it schema::

fuzz: setup-build
	@seed=$(or $(SEED),$$(date +%s)); echo "SECONDS=$(SECONDS) SEED=$$seed"; \
	FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$$seed cargo test --locked --lib fuzz_ -- --nocapture

slow: setup-build
	@scripts/setup.sh slow
	cargo build --release --locked --bin infra-controller
	python3 loadtest/slow.py

chaos: setup-build setup-test
	@seed=$(or $(SEED),$$(date +%s)); echo "SEED=$$seed"; \
	CHAOS_SEED=$$seed cargo test --locked --test it faults:: -- --nocapture --test-threads 2

loadtest: setup-build
	@scripts/setup.sh load
	cargo build --release --locked --bin infra-controller --examples
	$(if $(QUICK),QUICK=1,ROUNDS=$(ROUNDS) SECONDS_EACH=$(SECONDS_EACH)) python3 loadtest/run.py

setup-build:
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh test
