# Everything that one does with this repository. `make help` lists it. Root is needed where microVMs run; scripts/setup says so.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin
# Queries are checked against .sqlx, so that nothing needs a database to compile.
export SQLX_OFFLINE := true
# Slow things (kernels, images) live outside the checkout, under a hash of what they are made of.
export WRENN_CACHE := $(or $(WRENN_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/wrenn)
ARTIFACTS := $(WRENN_CACHE)/current
# Without it, tests on real microVMs say that they are skipped.
export WRENN_TEST_ARTIFACTS := $(ARTIFACTS)

# Makes the Debian package. Compiled once for each version, outside the checkout.
CARGO_DEB_VERSION := 3.8.0
export WRENN_CARGO_DEB := $(WRENN_CACHE)/cargo-deb/$(CARGO_DEB_VERSION)/bin/cargo-deb

TARGET := $(or $(CARGO_TARGET_DIR),target)
GUEST := x86_64-unknown-linux-gnu
PROGRAMS := wrenn wrenn-cp wrenn-agent
# Always the whole workspace: another choice of packages has other features, and compiles all libraries once more.
BUILD_DEV := cargo build --locked --workspace --bins
# With their tests, whose libraries have more features: else these would be compiled again for the tests.
BUILD_CHECK := cargo build --locked --workspace --all-targets
XTASK := $(TARGET)/debug/xtask
SUITE := .ci/suite
# By name, not by package, for the same reason.
WHOLE_MACHINE := $(patsubst tests/tests/%.rs,--test %,$(wildcard tests/tests/*.rs))

# Where the agent looks for it, with its jailer beside it.
FIRECRACKER := /usr/local/bin/firecracker
jailer = $(dir $(1))$(subst firecracker,jailer,$(notdir $(1)))

# The parsers are safe code: panics and endless loops are what there is to find, and a sanitizer would ask for another compiler.
FUZZ_TARGETS := $(notdir $(wildcard fuzz/corpus/*))
FUZZ_SECONDS ?= 60

# For `make dev` and `make dev-agent`.
DEV_DIR ?= $(or $(WRENN_DIR),/var/lib/wrenn)
CP_HOST_AGENT_ADDR ?= 127.0.0.1:50051
# Which images `make images` makes: all when empty. What only has to run here is content with the smallest.
IMAGES ?=
# More options for `make up`, for example ARGS='--listen 0.0.0.0:8000'.
ARGS ?=

.PHONY: help setup build build-envd deb images kernel up down demo dev dev-agent dev-frontend sqlx check check-kvm check-long fuzz bench bench-driver bench-cp bench-envd clean-host

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## install what is missing on this machine (Debian packages)
	@scripts/setup

build: setup ## release programs into builds/
	cargo build --locked --release -p cli -p control-plane -p host-agent
	@mkdir -p builds
	install -t builds $(addprefix $(TARGET)/release/,$(PROGRAMS))
	@$(MAKE) --no-print-directory build-envd

build-envd: setup ## the static guest agent into builds/
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked -p envd --profile guest --target $(GUEST)
	@mkdir -p builds
	install -t builds $(TARGET)/$(GUEST)/guest/envd

deb: build $(WRENN_CARGO_DEB) ## the Debian package of all programs into builds/
	@scripts/setup package
	$(WRENN_CARGO_DEB) deb --no-build --locked --package cli --output builds/

$(WRENN_CARGO_DEB):
	@scripts/setup build package
	env -u CARGO_TARGET_DIR cargo install --locked --quiet --root "$(@:/bin/cargo-deb=)" cargo-deb --version $(CARGO_DEB_VERSION)

images: setup ## guest kernel, initramfs and images into the cache; IMAGES="minimal python node" says which
	$(BUILD_DEV)
	$(XTASK) images --out "$(ARTIFACTS)" $(addprefix --image ,$(IMAGES))

kernel: ## compile the guest kernel of images/kernel into the cache (10 to 20 minutes); `make images` takes it from there
	@scripts/setup build kernel
	$(BUILD_DEV)
	$(XTASK) kernel

up: setup ## build, start the platform on this machine and keep it running (Ctrl-C ends it)
	$(BUILD_DEV)
	@$(MAKE) --no-print-directory images IMAGES="$(or $(IMAGES),minimal)"
	$(TARGET)/debug/wrenn up --artifacts "$(ARTIFACTS)" $(ARGS)

down: ## end the platform of `make up` with its sandboxes
	$(TARGET)/debug/wrenn down $(ARGS)

demo: ## build, then show that all of it works here; figures in builds/demo.json
	@rm -f builds/demo.json
	@began=$$SECONDS; scripts/setup; echo "setup: $$((SECONDS - began)) s"
	@began=$$SECONDS; $(BUILD_DEV); echo "build: $$((SECONDS - began)) s"
	@began=$$SECONDS; $(MAKE) --no-print-directory images IMAGES="$(or $(IMAGES),minimal)"; echo "images: $$((SECONDS - began)) s"
	@mkdir -p builds
	$(TARGET)/debug/wrenn demo --artifacts "$(ARTIFACTS)" --out builds/demo.json

dev: setup ## PostgreSQL, migrations and the control plane, for work on them; `make dev-agent` is its host
	$(BUILD_DEV)
	CP_HOST_AGENT_ADDR="$(CP_HOST_AGENT_ADDR)" $(TARGET)/debug/wrenn up --no-agent --dir "$(DEV_DIR)" --listen "$${WRENN_CP_LISTEN_ADDR:-:8000}" $(ARGS)

dev-agent: setup ## the host agent for `make dev`
	$(BUILD_DEV)
	$(XTASK) images --out "$(DEV_DIR)" $(addprefix --image ,$(or $(IMAGES),minimal))
	WRENN_DIR="$(DEV_DIR)" WRENN_CP_URL="$${WRENN_CP_URL:-http://127.0.0.1:8000}" \
	WRENN_REGISTRATION_TOKEN="$$([ -s "$(DEV_DIR)/host-token" ] || cat "$(DEV_DIR)/dev-registration-token")" \
		$(TARGET)/debug/wrenn-agent --address "$(CP_HOST_AGENT_ADDR)"

dev-frontend: ## the dashboard with hot reload
	@echo "There is no dashboard in this version of the repository: dashboard/ does not exist yet." >&2; exit 1

sqlx: setup ## ask a throw-away PostgreSQL about the store's queries and keep the answers in .sqlx
	scripts/xtask sqlx

check: ## everything that must hold: format, lints, rules of the house, every test
	@rm -f "$(TARGET)/suites"; mkdir -p "$(TARGET)"
	@$(SUITE) setup scripts/setup build run check package
	@$(SUITE) format cargo fmt --all --check
	@$(SUITE) lints cargo clippy --locked --workspace --all-targets -- -D warnings
	@$(SUITE) programs $(BUILD_CHECK)
	@$(SUITE) tidy $(XTASK) tidy
	@$(SUITE) queries $(XTASK) sqlx --check
	@$(SUITE) images $(XTASK) images --out "$(ARTIFACTS)"
	@$(SUITE) lab $(XTASK) lab --out "$(ARTIFACTS)"
	@$(SUITE) cargo-deb $(MAKE) --no-print-directory $(WRENN_CARGO_DEB)
	@$(SUITE) tests cargo test --locked --workspace --exclude whole-machine
	@$(SUITE) whole-machine cargo test --locked --workspace $(WHOLE_MACHINE)
	@$(SUITE) --summary

check-kvm: export WRENN_VMM := firecracker
check-kvm: export WRENN_FIRECRACKER_BIN := $(or $(WRENN_FIRECRACKER_BIN),$(FIRECRACKER))
check-kvm: export WRENN_JAILER_BIN := $(or $(WRENN_JAILER_BIN),$(call jailer,$(WRENN_FIRECRACKER_BIN)))
check-kvm: ## on a host with KVM: driver, table of facts and the whole machine on Firecracker; says what is missing for it
	@rm -f "$(TARGET)/suites"; mkdir -p "$(TARGET)"
	@$(SUITE) kvm-host .ci/kvm-host
	@$(SUITE) setup scripts/setup build run check
	@$(SUITE) programs $(BUILD_CHECK)
	@$(SUITE) images $(XTASK) images --out "$(ARTIFACTS)"
	@$(SUITE) cargo-deb $(MAKE) --no-print-directory $(WRENN_CARGO_DEB)
	@$(SUITE) kvm-boots cargo test --locked --workspace --test vmm -- --exact the_release_that_is_named_boots_a_guest_here
	@$(SUITE) kvm-driver cargo test --locked --workspace --test drivers -- --show-output firecracker::
	@WRENN_TEST_KERNEL="$$(ls -v "$(ARTIFACTS)"/kernels/vmlinux-*[0-9] | tail -1)" \
		$(SUITE) kvm-table cargo test --locked --workspace --test table --test jailer -- --show-output
	@$(SUITE) whole-machine cargo test --locked --workspace $(WHOLE_MACHINE)
	@$(SUITE) --summary

check-long: ## what takes too long for every change: hundreds of kills, long fuzzing
	@rm -f "$(TARGET)/suites"; mkdir -p "$(TARGET)"
	@$(SUITE) setup scripts/setup build run check
	@$(SUITE) programs $(BUILD_CHECK)
	@$(SUITE) images $(XTASK) images --out "$(ARTIFACTS)"
	@$(SUITE) lab $(XTASK) lab --out "$(ARTIFACTS)"
	@$(SUITE) tests-long cargo test --locked --workspace --exclude whole-machine --lib --bins --tests -- --ignored
	@$(SUITE) whole-machine-long cargo test --locked --workspace $(WHOLE_MACHINE) -- --ignored
	@$(SUITE) --summary

fuzz: ## each fuzz target for a minute; what it finds is in fuzz/artifacts
	@cargo fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is missing: cargo install --locked cargo-fuzz" >&2; exit 1; }
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p "fuzz/target/corpus/$$target"; \
		cargo fuzz run --sanitizer none "$$target" "fuzz/target/corpus/$$target" "fuzz/corpus/$$target" -- -max_total_time=$(FUZZ_SECONDS) -timeout=5; \
	done

bench: setup ## figures into builds/bench.json, each beside the bare VMM's of the same run, and those of bench-driver
	$(BUILD_DEV)
	@$(MAKE) --no-print-directory images IMAGES="$(or $(IMAGES),minimal)"
	@mkdir -p builds
	@failed=; $(TARGET)/debug/bench || failed=1; $(TARGET)/debug/bench-driver || failed=1; [ -z "$$failed" ]

bench-driver: setup ## figures of Firecracker's driver into builds/bench-driver.json, beside the same calls made by hand
	$(BUILD_DEV)
	@mkdir -p builds
	$(TARGET)/debug/bench-driver

bench-cp: setup ## figures of the control plane alone into builds/bench-cp.json, each beside its floor
	$(BUILD_DEV)
	$(TARGET)/debug/bench-cp

bench-api: setup ## figures of the way through the API into builds/bench-api.json, each beside envd asked without it
	$(BUILD_DEV)
	cargo bench --locked --profile dev --workspace --bench api

bench-envd: setup build-envd ## figures of envd into builds/bench-envd.json, each beside its floor
	$(BUILD_DEV)
	@$(MAKE) --no-print-directory images IMAGES="$(or $(IMAGES),minimal)"
	$(TARGET)/debug/bench-envd

clean-host: ## remove what test runs that were killed left on this machine
	@.ci/clean-host
