"""Writes OUT/kernels/N_NAME.cpp for each NAME.cu given: the source for the host, and a registration of its kernels.

    python3 kernels.py OUT CXX FLAGS... -- FILE.cu ...
"""

import pathlib
import re
import shutil
import subprocess
import sys

# What a kernel's source may include of the toolkit: all of it is sim.h.
HEADERS = [
    "cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h", "mma.h", "math_constants.h",
    "cuda_pipeline.h", "cuda/std/limits",
]  # fmt: skip
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\];")
WAITING = re.compile(r"__sync|__shfl|__ballot|__any_sync|__all_sync|__reduce|mma_")
KERNEL = re.compile(r"(template\s*<[^>]*>\s*)?sim_entry\s+void\s+(\w+)\s*\(")
INCLUDE = re.compile(r'#\s*include\s+"([^"]+)"')
# A header of candle's with barriers in a function that its kernels do not call.
WITHOUT_BARRIERS = "cuda_utils.cuh"


def for_the_host(text):
    """A kernel's source with its dynamic shared memory as a pointer."""
    return DYNAMIC_SHARED.sub(r"\1 *\2 = (\1 *)sim_dynamic_shared();", text)


def write_sources(folder, to):
    """The headers beside a kernel's source, which it includes by name."""
    to.mkdir(parents=True)
    for header in [*folder.glob("*.cuh"), *folder.glob("*.h")]:
        (to / header.name).write_text(for_the_host(header.read_text()))


def waits(file):
    """Whether barriers or shuffles are in a source or in a header that it includes: its kernels run as fibers."""
    text = file.read_text()
    headers = [file.parent / name for name in INCLUDE.findall(text) if name != WITHOUT_BARRIERS]
    return bool(WAITING.search(text)) or any(waits(header) for header in headers if header.exists())


def main():
    cut = sys.argv.index("--")
    out, compiler = pathlib.Path(sys.argv[1]), sys.argv[2:cut]
    files = [pathlib.Path(file).resolve() for file in sys.argv[cut + 1 :]]
    for old in ["sources", "kernels"]:
        shutil.rmtree(out / old, ignore_errors=True)
    sources, kernels = out / "sources", out / "kernels"
    kernels.mkdir(parents=True)
    toolkit = sources / "toolkit"
    for name in HEADERS:
        (toolkit / name).parent.mkdir(parents=True, exist_ok=True)
        (toolkit / name).write_text('#include "sim.h"\n')
    # A folder of sources each, since two may have a file of one name.
    folders = {folder: sources / str(i) for i, folder in enumerate(sorted({file.parent for file in files}))}
    for folder, to in folders.items():
        write_sources(folder, to)
    for i, file in enumerate(files):
        to = folders[file.parent] / file.name
        to.write_text(for_the_host(file.read_text()))
        body = f'#include "sim.h"\nnamespace {{\n#include "{to.resolve()}"\n'
        expanded = subprocess.run(
            [*compiler, f"-I{toolkit}", "-E", "-P", "-D__global__=sim_entry", "-x", "c++", "-"],
            input=body + "}\n", capture_output=True, text=True,
        )  # fmt: skip
        if expanded.returncode:
            sys.exit(f"{file}:\n{expanded.stderr}")
        fibers = str(waits(to)).lower()
        names = [name for template, name in KERNEL.findall(expanded.stdout) if not template]
        lines = "".join(f'    sim_add<{name}>("{name}", {fibers}, {name});\n' for name in names)
        (kernels / f"{i}_{file.stem}.cpp").write_text(f"{body}struct Start {{ Start() {{\n{lines}}} }} start;\n}}\n")
        print(f"{file.name}: {len(names)} kernels" + (" with barriers" if fibers == "true" else ""))


main()
