#!/bin/sh
# Installs the packages that a target of the Makefile needs, and reports each installation. If all are
# installed it ends within a second.
#
#   scripts/setup.sh build         a C compiler and cmake, for the C libraries in the crates; bubblewrap and
#                                  slirp4netns, for the sandbox of functions
#   scripts/setup.sh test          redis-server, h2load, ab, curl, systemd-analyze, bubblewrap, slirp4netns,
#                                  Prometheus with promtool, Node.js with undici, and a Python venv with the
#                                  AWS emulator, schemathesis and httpx
#   scripts/setup.sh load          redis-server, wrk, and a Python venv with k6
#   scripts/setup.sh slow          slowhttptest
#   scripts/setup.sh instructions  valgrind
set -eu
cd "$(dirname "$0")/.."

VENV=.venv-test
REQUIREMENTS=tests/it/requirements.txt
NODE_DIR=.node-test
NODE_PACKAGES=tests/it/clients
LOAD_VENV=.venv-load
LOAD_REQUIREMENTS=loadtest/requirements.txt

say() {
    printf 'setup: %s\n' "$*" >&2
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# install PACKAGE... - with apt, as root or through sudo. Otherwise it names the packages and fails.
install() {
    if ! has apt-get; then
        say "apt-get was not found. Install the equivalent of these Debian packages, then try again: $*"
        exit 1
    fi
    as_root=
    if [ "$(id -u)" -ne 0 ]; then
        if ! has sudo; then
            say "installation needs root or sudo. Install these packages, then try again: $*"
            exit 1
        fi
        as_root=sudo
    fi
    say "installing with apt: $*"
    export DEBIAN_FRONTEND=noninteractive
    $as_root apt-get update -q
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
}

# Installs Prometheus without its service, which would listen on port 9090 of all addresses. The tests start
# the program themselves. Where systemd does not run, nothing starts.
install_prometheus() {
    if [ ! -d /run/systemd/system ]; then
        install prometheus
        return
    fi
    as_root=
    [ "$(id -u)" -eq 0 ] || as_root=sudo
    $as_root systemctl mask --runtime --quiet prometheus.service
    install prometheus
    $as_root systemctl unmask --runtime --quiet prometheus.service
    $as_root systemctl disable --quiet prometheus.service
}

setup_build() {
    missing=
    has cmake || missing="$missing cmake"
    has cc && has make || missing="$missing build-essential"
    # For the sandbox of functions.
    has bwrap || missing="$missing bubblewrap"
    has slirp4netns || missing="$missing slirp4netns"
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || install $missing
}

setup_test() {
    missing=
    has redis-server || missing="$missing redis-server"
    has setpriv || missing="$missing util-linux"
    has h2load || missing="$missing nghttp2-client"
    has ab || missing="$missing apache2-utils"
    # Debian packages these modules separately. Other Pythons (pyenv) include them.
    has python3 && python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3 python3-venv"
    has curl || missing="$missing curl"
    has systemd-analyze || missing="$missing systemd"
    has node || missing="$missing nodejs"
    has npm || missing="$missing npm"
    has bwrap || missing="$missing bubblewrap"
    has slirp4netns || missing="$missing slirp4netns"
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || install $missing
    has prometheus && has promtool || install_prometheus

    make_venv "$VENV" "$REQUIREMENTS"
    make_node_modules
}

# Installs the packages of the Node.js client from their lock file. The copy of the lock file marks a complete
# installation: it is written last.
make_node_modules() {
    if cmp -s "$NODE_PACKAGES/package-lock.json" "$NODE_DIR/package-lock.json.installed"; then
        return
    fi
    say "installing the packages of $NODE_PACKAGES/package.json into $NODE_DIR"
    rm -rf "$NODE_DIR"
    mkdir "$NODE_DIR"
    cp "$NODE_PACKAGES/package.json" "$NODE_PACKAGES/package-lock.json" "$NODE_DIR"
    npm ci --prefix "$NODE_DIR" --ignore-scripts --no-audit --no-fund --loglevel=error
    cp "$NODE_PACKAGES/package-lock.json" "$NODE_DIR/package-lock.json.installed"
}

# make_venv DIRECTORY REQUIREMENTS
make_venv() {
    # The copy of the requirements marks a complete installation: it is written last. A venv whose Python was
    # removed is made again.
    if cmp -s "$2" "$1/requirements.txt" && "$1/bin/python" -c '' 2>/dev/null; then
        return
    fi
    say "installing the $(grep -c == "$2") packages of $2 and their dependencies into $1"
    rm -rf "$1"
    python3 -m venv "$1"
    "$1/bin/python" -m pip install --quiet --no-input --disable-pip-version-check -r "$2"
    cp "$2" "$1/requirements.txt"
}

setup_load() {
    missing=
    has redis-server || missing="$missing redis-server"
    has wrk || missing="$missing wrk"
    has python3 && python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3 python3-venv"
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || install $missing
    make_venv "$LOAD_VENV" "$LOAD_REQUIREMENTS"
}

case "${1:-}" in
    build) setup_build ;;
    test) setup_test ;;
    load) setup_load ;;
    slow) has slowhttptest || install slowhttptest ;;
    instructions) has valgrind || install valgrind ;;
    *)
        say "usage: $0 build|test|load|slow|instructions"
        exit 2
        ;;
esac
