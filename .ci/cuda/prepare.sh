#!/bin/bash
# Prepares a CUDA build on an x86-64 Linux machine without a GPU, a driver or a CUDA toolkit.
#   usage: .ci/cuda/prepare.sh [--card] DEST
#          cargo build --release --features cuda,cudnn --config DEST/cuda.toml
# A real build: nvcc 13.0 and its headers from PyPI. With --card, a build that runs on the card of tests/cuda_card alone:
# its kernels are names (card-nvcc), gcc and Python are all it needs, and nothing is fetched. Either way the CUDA
# libraries are opened at the first call, so that the one binary also runs where there are none. A machine with a toolkit
# needs none of this.
# Needs Python 3.9, gcc and cargo; without --card also pip, and DEST takes 410 MB. CUDA_COMPUTE_CAP (default 80, the
# first with bfloat16; with --card 75, so that its tests try both) is the oldest card the kernels are for: the driver
# compiles them for newer ones at the first use.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage="usage: .ci/cuda/prepare.sh [--card] DEST"
card=
[ "${1:-}" = --card ] && { card=1; shift; }
mkdir -p "${1:?$usage}"
dest=$(cd "$1" && pwd)

if [ -n "$card" ]; then
  cuda=$dest/card
  nvcc=$here/card-nvcc
  toolkit=()
  oldest=75
  mkdir -p "$cuda/lib"
else
  cuda=$dest/python/nvidia/cu13
  nvcc=$here/nvcc
  toolkit=("$cuda/lib")
  oldest=80
  PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check \
    --no-deps --no-compile --upgrade --target "$dest/python" \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
fi
ln -sfn lib "$cuda/lib64"

# The archives follow the very sources of cudarc and candle-kernels that cargo will build.
source_of() {
  cargo metadata --manifest-path "$here/../../Cargo.toml" --locked --format-version 1 --all-features |
    python3 -c 'import json, pathlib, sys
print(*[pathlib.Path(p["manifest_path"]).parent for p in json.load(sys.stdin)["packages"] if p["name"] == sys.argv[1]])' "$1"
}
rm -rf "$cuda/lib/stubs"
python3 "$here/lazy_libraries.py" "$(source_of cudarc)" "$cuda/lib/stubs"
python3 "$here/missing_kernels.py" "$(source_of candle-kernels)" "$cuda/lib/stubs" "${toolkit[@]}"

cat > "$dest/cuda.toml" <<TOML
[env]
CUDA_HOME = "$cuda"
NVCC = "$nvcc"
CUDA_COMPUTE_CAP = "${CUDA_COMPUTE_CAP:-$oldest}"
CUDARC_CUDA_VERSION = "13000"
CUDAFORGE_THREADS = "$(nproc)"
TOML
echo "build with: cargo build --release --features cuda,cudnn --config $dest/cuda.toml"
