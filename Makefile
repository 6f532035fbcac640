# The commands of this project. Each takes no input, shows what it does, and is quick when nothing has changed.
# The work is in tools/, where every script says what it is for.

.DEFAULT_GOAL := help
.PHONY: help setup dev build test simulate bench clean

help:
	@echo 'make dev       a local model and the Worker on http://localhost:8787, with a token and a first curl (PORT=8788 moves it)'
	@echo 'make build     build/index.js and build/index_bg.wasm, what wrangler dev and wrangler deploy take'
	@echo 'make test      everything CI runs: format, lints, tests, build, end to end through workerd'
	@echo 'make simulate  100,000 seeds through the ledger'\''s model'
	@echo 'make bench     what the Worker costs, beside a bare relay'
	@echo 'make setup     only install the tools that are missing (the others do it too)'
	@echo 'make clean     remove all that was built, installed or stored in this checkout'

setup:
	@tools/setup

dev:
	@tools/dev

build:
	@tools/build

test:
	@tools/test

# The same test is part of `make test`, with fewer seeds.
simulate:
	INKSTONE_SEEDS=100000 cargo test --release --test ledger_model

bench: build
	@bench/run

# The compiled tools and the model stay in the user-level cache (~/.cache/inkstone), other checkouts use them.
clean:
	rm -rf build target node_modules .wrangler .inkstone
