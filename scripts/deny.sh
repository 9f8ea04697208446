#!/bin/sh
# Checks the dependencies against deny.toml: known vulnerabilities (advisories), licences, bans and sources.
#
# It needs cargo-deny and the database of advisories. If the database cannot be reached, nothing is installed.
# An installed cargo-deny then checks all but advisories. A message reports each check that was skipped.
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

is_reachable() {
    GIT_TERMINAL_PROMPT=0 timeout 20 git ls-remote --exit-code "$DATABASE" HEAD >/dev/null 2>&1
}

if is_reachable; then
    if ! command -v cargo-deny >/dev/null 2>&1; then
        say "installing cargo-deny $VERSION into $TOOLS"
        cargo install --quiet --locked --root "$TOOLS" --version "^$VERSION" cargo-deny
    fi
    cargo deny --locked check --hide-inclusion-graph
elif command -v cargo-deny >/dev/null 2>&1; then
    say "the database of advisories is not reachable: only licences, bans and sources are checked"
    cargo deny --locked check --hide-inclusion-graph bans licenses sources
else
    say "the database of advisories is not reachable, cargo-deny is not installed: nothing is checked"
fi
