#!/usr/bin/env python3
"""Writes OUT/libcudart.a: the static CUDA runtime, and entry points that abort in place of the kernels left out.

    missing_kernels.py CANDLE_KERNELS_SOURCE OUT [TOOLKIT_LIB]

The kernels are those that `.ci/cuda/nvcc` and `card-nvcc` leave out: quantised and mixture-of-experts matrix products,
which no layer of ours calls. candle-core refers to them all the same. Without TOOLKIT_LIB there is no runtime in it:
nothing but those kernels calls it.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

source, out = map(pathlib.Path, sys.argv[1:3])
names = sorted(set(re.findall(r"pub fn (\w+)\(", (source / "src" / "ffi.rs").read_text())))
assert names, f"{source}/src/ffi.rs declares no functions"

code = r"""
#include <stdio.h>
#include <stdlib.h>
static void left_out(const char *name) {
    fprintf(stderr, "%s: this build has no quantised kernels\n", name);
    abort();
}
"""
code += "".join(f'void {name}(void) {{ left_out("{name}"); }}\n' for name in names)

out.mkdir(parents=True, exist_ok=True)
archive = (out / "libcudart.a").resolve()
archive.unlink(missing_ok=True)
if len(sys.argv) > 3:
    shutil.copy(pathlib.Path(sys.argv[3]) / "libcudart_static.a", archive)
with tempfile.TemporaryDirectory() as folder:
    part = pathlib.Path(folder) / "missing_kernels.o"
    subprocess.run(["gcc", "-O1", "-fPIC", "-x", "c", "-c", "-", "-o", part], input=code.encode(), check=True)
    subprocess.run(["ar", "crs", archive, part], check=True)
print(f"{archive}: {len(names)} kernels left out")
