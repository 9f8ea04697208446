# Requirements: make, a Rust toolchain, Debian or Ubuntu. scripts/setup.sh installs all other packages.

PORT ?= 8080

# Rounds of `make loadtest`, and seconds of each of their runs. QUICK=1: one short round.
ROUNDS ?= 5
SECONDS_EACH ?= 8
QUICK ?=

# Seconds of `make schema` and of each target of `make fuzz`. SEED repeats a run, also of `make chaos`.
SECONDS ?= 600
SEED ?=

# Runs of `make sim` (default: about a million jobs), and most runs of `make mutants` for each mutant.
RUNS ?=
SIM_RUNS = $(or $(RUNS),14000)
MUTANT_RUNS = $(or $(RUNS),2000)

# ACCEPT=1: `make instructions` writes its counts as the new bounds.
ACCEPT ?=

# Most tests wait for leases and deadlines, and use little CPU.
TEST_THREADS ?= $(shell expr 2 '*' $$(nproc))

# What `make run` builds: `dev` uses no AWS crate, and those are half of the build.
QUICK_BUILD = --locked --no-default-features --profile quick

.PHONY: help run build check test sim mutants bench instructions loadtest schema fuzz chaos slow
.PHONY: setup-build setup-test

help:
	@echo 'Run'
	@echo '  make run           build `infra-controller dev` and start it on port $(PORT) (PORT=...)'
	@echo '  make build         build the release: target/release/infra-controller'
	@echo
	@echo 'Test'
	@echo '  make check         format, lints and unit tests: before each commit'
	@echo '  make test          all checks and tests, as in CI'
	@echo '  make sim           a fleet in virtual time, with faults (RUNS=..., SEED=...: the first seed)'
	@echo '  make mutants       whether the simulation finds deliberate faults (RUNS=...: most of each)'
	@echo '  make schema        requests generated from the OpenAPI description (SECONDS=$(SECONDS), SEED=...)'
	@echo '  make fuzz          fuzz the parsers of external input (SECONDS=$(SECONDS) each, SEED=...)'
	@echo '  make chaos         repeated faults under load, with outages of up to a minute (SEED=...)'
	@echo '  make slow          slow clients beside a normal one (slowhttptest)'
	@echo
	@echo 'Measure'
	@echo '  make bench         time of a request and of its parts (criterion)'
	@echo '  make instructions  instructions a request, against their bounds (ACCEPT=1: set new bounds)'
	@echo '  make loadtest      cost compared with bare Pingora, and targets under load'
	@echo '                     (QUICK=1, ROUNDS=$(ROUNDS), SECONDS_EACH=$(SECONDS_EACH))'
	@echo
	@echo 'Set up (the other targets do this)'
	@echo '  make setup-build   install what the build needs'
	@echo '  make setup-test    install what the tests need'

run: setup-build
	cargo run $(QUICK_BUILD) -- dev --port $(PORT)

build: setup-build
	cargo build --release --locked --bin infra-controller

check: setup-build
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo test --locked --lib

test: setup-build setup-test
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo check --locked --no-default-features
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items
	RUST_TEST_THREADS=$(TEST_THREADS) cargo test --locked
	scripts/deny.sh

sim: setup-build
	SIM_SEED=$(or $(SEED),1) SIM_RUNS=$(SIM_RUNS) \
	cargo test --locked --profile sim --lib simulation::a_fleet -- --nocapture

mutants: setup-build
	RUNS=$(MUTANT_RUNS) scripts/mutants.py

schema: setup-build setup-test
	@seed=$(or $(SEED),$$(date +%s)); echo "SECONDS=$(SECONDS) SEED=$$seed"; \
	SCHEMA_SECONDS=$(SECONDS) SCHEMA_SEED=$$seed cargo test --locked --test it schema::

fuzz: setup-build
	@seed=$(or $(SEED),$$(date +%s)); echo "SECONDS=$(SECONDS) SEED=$$seed"; \
	FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$$seed cargo test --locked --lib fuzz_ -- --nocapture

chaos: setup-build setup-test
	@seed=$(or $(SEED),$$(date +%s)); echo "SEED=$$seed"; \
	CHAOS_SEED=$$seed cargo test --locked --test it faults:: -- --nocapture --test-threads 2

slow: build
	@scripts/setup.sh slow
	python3 loadtest/slow.py

bench: setup-build
	cargo bench --locked --bench request

# Without AWS crates: the counted code does not use them.
instructions: setup-build
	@scripts/setup.sh instructions
	cargo bench --locked --no-default-features --profile instructions --bench instructions \
	  -- $(if $(ACCEPT),accept)

loadtest: setup-build
	@scripts/setup.sh load
	cargo build --release --locked --bin infra-controller --examples
	$(if $(QUICK),QUICK=1,ROUNDS=$(ROUNDS) SECONDS_EACH=$(SECONDS_EACH)) python3 loadtest/run.py

setup-build:
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh test
