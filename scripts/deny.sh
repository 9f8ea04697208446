#!/bin/sh
# Holds the dependencies to deny.toml: known faults (advisories), licences, bans and sources.
#
# It needs cargo-deny and its database of advisories. Where the database cannot be had nothing is installed for it, and that is said; the
# rest is checked all the same if cargo-deny is there.
set -eu
cd "$(dirname "$0")/.."

DATABASE=https://github.com/RustSec/advisory-db
VERSION=0.20
TOOLS=target/tools

say() {
    printf 'deny: %s\n' "$*" >&2
}

PATH="$PWD/$TOOLS/bin:$PATH"
export PATH

can_be_had() {
    GIT_TERMINAL_PROMPT=0 timeout 20 git ls-remote --exit-code "$DATABASE" HEAD >/dev/null 2>&1
}

if can_be_had; then
    if ! command -v cargo-deny >/dev/null 2>&1; then
        say "installing cargo-deny $VERSION into $TOOLS"
        cargo install --quiet --locked --root "$TOOLS" --version "^$VERSION" cargo-deny
    fi
    cargo deny --locked check --hide-inclusion-graph
elif command -v cargo-deny >/dev/null 2>&1; then
    say "the database of advisories cannot be had: only licences, bans and sources are checked"
    cargo deny --locked check --hide-inclusion-graph bans licenses sources
else
    say "the database of advisories cannot be had, and cargo-deny is not here: dependencies are not checked"
fi
