#!/usr/bin/env bash
# Set up everything in a virtual environment inside the checkout: PyTorch CPU, vLLM, MindSpore, the C++ operators and
# this package. Run again at any time: finished steps are skipped, an interrupted one is done again.
#
#   deploy/setup.sh            what `make serve` needs
#   deploy/setup.sh test       and what `make test` needs
#
# Environment: VENV (default .venv in the checkout), PYTHON (default python3.11), VLLM (another version of vLLM, with a
# virtual environment of its own: .venv-vllm-$VLLM), TORCH_INDEX_URL (index of a CPU build of PyTorch), and pip's own
# variables for the package index.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
WITH_TESTS=0
case "${1:-}" in
"") ;;
test) WITH_TESTS=1 ;;
*)
    echo "usage: deploy/setup.sh [test]" >&2
    exit 2
    ;;
esac
PYTHON="${PYTHON:-python3.11}"
VLLM="${VLLM:-}"
VENV="${VENV:-$ROOT/.venv${VLLM:+-vllm-$VLLM}}"
VENV_PYTHON="$VENV/bin/python"
STAMPS="$VENV/.setup"
LOG="$ROOT/build/setup.log"
LOCK="$ROOT/build/setup.lock"
NEEDED_MIB=9000
CURRENT_STEP=""
TICKER=""
STEP_NUMBER=0
STEP_COUNT=$((WITH_TESTS ? 8 : 7))

# Anything that would send pip or Python to another place than the virtual environment.
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT PIP_REQUIREMENT PIP_NO_DEPS
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONNOUSERSITE=1

stop() {
    echo "set-up: $1" >&2
    exit 1
}

stop_ticker() {
    if [ -n "$TICKER" ]; then
        kill "$TICKER" 2>/dev/null || true
        wait "$TICKER" 2>/dev/null || true
        TICKER=""
    fi
}

on_exit() {
    local status=$?
    stop_ticker
    if [ -n "$CURRENT_STEP" ] && [ "$status" -ne 0 ]; then
        printf '\n\nset-up: the step "%s" did not finish (exit code %s). Last lines of %s:\n\n' \
            "$CURRENT_STEP" "$status" "$LOG" >&2
        tail -n 25 "$LOG" | sed 's/^/    /' >&2
        printf '\nThe same command continues from this step.\n' >&2
    fi
}
trap on_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Shows the seconds that have passed, on a terminal only.
start_ticker() {
    [ -t 1 ] || return 0
    local line="$1"
    (
        trap - EXIT INT TERM HUP
        begin=$SECONDS
        while sleep 1; do printf '\r%s %s s' "$line" $((SECONDS - begin)); done
    ) &
    TICKER=$!
}

digest() { sha256sum | cut -c1-16; }

other_versions() { find deploy -name 'constraints-vllm-*.txt' | sed 's/.*-vllm-//; s/\.txt$//' | sort | tr '\n' ' '; }

pins() { "$VENV_PYTHON" -I deploy/pins.py "$@"; }

is_done() { [ "$(cat "$STAMPS/$1" 2>/dev/null)" = "$2" ]; }

# step NAME KEY TITLE COMMAND...: run COMMAND unless it finished with the same KEY (the digest of its inputs) before.
step() {
    local name="$1" key="$2" title="$3" line begin
    shift 3
    STEP_NUMBER=$((STEP_NUMBER + 1))
    if is_done "$name" "$key"; then return 0; fi
    line="[$STEP_NUMBER/$STEP_COUNT] $title ..."
    printf '%s' "$line"
    printf '\n=== %s %s\n' "$(date '+%F %T')" "$title" >>"$LOG"
    CURRENT_STEP="$title"
    begin=$SECONDS
    rm -f "$STAMPS/$name"
    start_ticker "$line"
    "$@" >>"$LOG" 2>&1 </dev/null
    stop_ticker
    mkdir -p "$STAMPS"
    printf '%s\n' "$key" >"$STAMPS/$name.new"
    mv "$STAMPS/$name.new" "$STAMPS/$name"
    CURRENT_STEP=""
    [ ! -t 1 ] || printf '\r%s' "$line"
    printf ' done in %s s\n' $((SECONDS - begin))
}

# Fills DIGEST, TOTAL, MISSING and VERSION (of the first pin) per section of deploy/constraints.txt.
declare -A DIGEST TOTAL MISSING VERSION
read_pins() {
    local answer section key total missing version
    answer="$(pins status pip torch packages vllm test)"
    while read -r section key total missing version; do
        DIGEST[$section]="$key" TOTAL[$section]="$total" MISSING[$section]="$missing" VERSION[$section]="$version"
    done <<<"$answer"
}

# A step whose result is the packages of a section: done when these are installed, whoever installed them.
pinned_step() {
    local section="$1"
    shift
    if [ "${MISSING[$section]}" -ne 0 ]; then
        rm -f "$STAMPS/$section"
    elif ! is_done "$section" "${DIGEST[$section]}"; then
        mkdir -p "$STAMPS"
        printf '%s\n' "${DIGEST[$section]}" >"$STAMPS/$section"
    fi
    step "$section" "${DIGEST[$section]}" "$@"
}

check_machine() {
    [ -z "$VLLM" ] || [ -f "deploy/constraints-vllm-$VLLM.txt" ] ||
        stop "VLLM=$VLLM: no such version is pinned. Leave VLLM out, or take one of: $(other_versions)"
    command -v g++ >/dev/null ||
        stop "g++ is needed to compile the operators. Install it (Debian and Ubuntu: apt-get install g++)."
    command -v flock >/dev/null || stop "flock is needed (package util-linux)."
    [ ! -e "$STAMPS/venv" ] || ! "$VENV_PYTHON" -c '' 2>/dev/null || return 0
    [ "$(uname -s)" = Linux ] || stop "this runs on Linux only (found $(uname -s))."
    "$PYTHON" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
        stop "Python 3.11 is needed and '$PYTHON' is not one. Install it (Debian 12: apt-get install python3.11 python3.11-venv), or name it: make … PYTHON=/path/to/python3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "'$PYTHON' has no venv module. Install it (Debian and Ubuntu: apt-get install python3.11-venv)."
    if [ -x "$VENV_PYTHON" ] && ! "$VENV_PYTHON" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))'; then
        stop "$VENV is not a Python 3.11 environment. Remove it, or use another: make … VENV=/path"
    fi
    local free
    free="$(df -Pm "$ROOT" | awk 'NR == 2 { print $4 }')"
    [ -x "$VENV_PYTHON" ] || [ "$free" -ge "$NEEDED_MIB" ] ||
        stop "$((NEEDED_MIB / 1000)) GB of free disk are needed in $ROOT; there are $free MB."
}

take_lock() {
    exec 9>"$LOCK"
    if ! flock -n 9; then
        echo "set-up: another set-up is running in this checkout; waiting for it ..."
        flock 9
    fi
}

# An environment that works is kept, whoever made it; a half-made or moved one of ours is made anew.
make_environment() {
    if [ ! -e "$STAMPS.making" ] && [ -z "$MADE_FOR" ] && "$VENV_PYTHON" -m pip --version; then
        return 0
    fi
    if [ ! -e "$STAMPS.making" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
        echo "$VENV exists and is not a virtual environment. Remove it, or use another: make … VENV=/path"
        return 1
    fi
    mkdir -p "$VENV"
    touch "$STAMPS.making"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name .setup.making -exec rm -rf {} +
    "$PYTHON" -m venv "$VENV"
    "$VENV_PYTHON" -m pip install "$(pins list pip)"
    rm "$STAMPS.making"
}

install_torch() {
    local answer arguments
    answer="$("$VENV_PYTHON" -I deploy/find_torch.py "${VERSION[torch]}")"
    mapfile -t arguments <<<"$answer"
    echo "pip install --no-deps ${arguments[*]}"
    if ! "$VENV_PYTHON" -m pip install --no-deps "${arguments[@]}"; then
        echo "No CPU build of PyTorch could be installed. Set TORCH_INDEX_URL to an index that has one, or"
        echo "PIP_FIND_LINKS to a directory with its wheel."
        return 1
    fi
}

# Every package is pinned, so nothing is resolved: pip installs exactly these.
install_pins() {
    local wanted
    wanted="$(pins missing "$1")"
    [ -z "$wanted" ] || "$VENV_PYTHON" -m pip install --no-deps --requirement /dev/stdin <<<"$wanted"
}

# From source with no device kernels. No cache: pip's would hand out a build made for another device.
install_vllm() {
    VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE="${VERSION[vllm]}" \
        "$VENV_PYTHON" -m pip install --no-deps --no-build-isolation --no-cache-dir --no-binary vllm "vllm==${VERSION[vllm]}"
}

build_operators() { "$VENV_PYTHON" -P vllm_mindspore/ops/build.py; }

install_package() { "$VENV_PYTHON" -m pip install --no-deps --no-build-isolation --editable .; }

check_result() { "$VENV/bin/vllm-mindspore" env --check; }

operators_key() {
    {
        g++ -dumpfullversion
        echo "${DIGEST[packages]}"
        find vllm_mindspore/ops/csrc vllm_mindspore/ops/build.py -type f -print0 | sort -z | xargs -0 sha256sum
    } | digest
}

package_key() { cat setup.py pyproject.toml vllm_mindspore/version.py | digest; }

check_machine
mkdir -p build
take_lock
[ "$(stat -c %s "$LOG" 2>/dev/null || echo 0)" -lt 10000000 ] || rm -f "$LOG"
[ -x "$VENV_PYTHON" ] && [ ! -e "$STAMPS.making" ] || rm -f "$STAMPS/venv"
MADE_FOR="$(cat "$STAMPS/venv" 2>/dev/null || true)" # another path: the checkout was moved, a virtual environment cannot be
step venv "$(echo "$VENV" | digest)" "virtual environment in ${VENV#"$ROOT"/}" make_environment
read_pins
pinned_step torch "PyTorch ${VERSION[torch]} for CPU" install_torch
pinned_step packages "MindSpore, NumPy and $((TOTAL[packages] - 2)) other packages" install_pins packages
pinned_step vllm "vLLM ${VERSION[vllm]} from source, without device kernels" install_vllm
[ "$WITH_TESTS" = 0 ] || pinned_step test "test tools" install_pins test
[ -e vllm_mindspore/ops/lib/libvllm_ms_cpu.so ] || rm -f "$STAMPS/operators"
step operators "$(operators_key)" "C++ operators" build_operators
step package "$(package_key)" "vllm-mindspore" install_package
step check "$(cat "$STAMPS"/{torch,packages,vllm,operators,package} | digest)" "check of the result" check_result
