#!/bin/bash
# Builds CUDA libraries that run everything on the CPU.
#   usage: build.sh OUT PROJECT [KERNELS.cu ...]     (g++ 12 or newer, Python 3, cargo; x86-64 with AVX2, FMA and F16C)
# candle's kernels come from the source that PROJECT's Cargo.lock names; PROJECT/src/kernels/cuda/*.cu and further .cu
# files are added to them. What has not changed since the last build into OUT is not compiled again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: build.sh OUT PROJECT [KERNELS.cu ...]}"
out=$(cd "$1" && pwd)
project=${2:?usage: build.sh OUT PROJECT [KERNELS.cu ...]}
shift 2
candle=$(cargo metadata --manifest-path "$project/Cargo.toml" --locked --format-version 1 --all-features |
  python3 -c 'import json, pathlib, sys
print(*[pathlib.Path(p["manifest_path"]).parent for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"])')
files=("$here/selftest.cu")
for name in affine binary cast conv fill indexing reduce sort ternary unary; do files+=("$candle/src/$name.cu"); done
shopt -s nullglob
for file in "$@" "$project"/src/kernels/cuda/*.cu; do files+=("$(realpath "$file")"); done
readarray -t files < <(printf '%s\n' "${files[@]}" | awk '!seen[$0]++') # a file given twice is one

flags=(-std=c++17 -O2 -mavx2 -mfma -mf16c -fPIC -w -fvisibility=hidden "-I$here" -fno-strict-aliasing -fpermissive)
python3 "$here/kernels.py" "$out" g++ "${flags[@]}" -- "${files[@]}"

compile() { # SOURCE: a file that is the same after the preprocessor gives the object that is there
  local object text
  object=$out/objects/$(basename "$1" .cpp)
  text=$(mktemp)
  g++ "${flags[@]}" "-I$out/sources/toolkit" -E -P "$1" -o "$text" || return
  cmp -s "$text" "$object.text" && [ -f "$object.o" ] && { rm "$text"; return; }
  rm -f "$object.o"
  g++ "${flags[@]}" "-I$out/sources/toolkit" -c "$1" -o "$object.o" && mv "$text" "$object.text"
}
mkdir -p "$out/objects"
running=()
objects=()
for file in "$out"/kernels/*.cpp "$here"/*.cpp; do
  objects+=("$out/objects/$(basename "$file" .cpp).o")
  compile "$file" &
  running+=($!)
  if [ ${#running[@]} -ge "$(nproc)" ]; then wait "${running[0]}"; running=("${running[@]:1}"); fi
done
for process in "${running[@]}"; do wait "$process"; done
g++ -shared -o "$out/libcudasim.so" "${objects[@]}" -lpthread
for name in libcuda.so.1 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libcudnn.so.9 libnvrtc.so.13; do
  ln -sf libcudasim.so "$out/$name"
done
