#!/usr/bin/env bash
# Serve a model with the environment of deploy/setup.sh: deploy/serve.sh MODEL [options of vllm serve]
# An empty MODEL is the demo model of this repository, under the name "demo". Environment: VENV, VLLM, HOST, PORT.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv${VLLM:+-vllm-$VLLM}}"
MODEL="${1:-}"
[ $# -eq 0 ] || shift
NAME=()
if [ -z "$MODEL" ]; then
    MODEL="$("$VENV/bin/python" -c 'from vllm_mindspore.demo import model_path; print(model_path())')"
    NAME=(--served-model-name demo)
fi
case "$MODEL" in
/* | ./* | ../*)
    if [ ! -e "$MODEL" ]; then
        echo "serve: there is no directory $MODEL. MODEL is a directory or a hub id such as Qwen/Qwen3-0.6B." >&2
        exit 1
    fi
    ;;
esac
export PATH="$VENV/bin:$PATH"
exec "$VENV/bin/vllm" serve "$MODEL" --backend mindspore --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "${NAME[@]}" "$@"
