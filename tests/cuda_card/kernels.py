"""The kernels of .cu files, found by the preprocessor.

    python3 kernels.py OUT CXX FLAGS... -- FILE.cu ...

writes OUT/kernels/N_NAME.cpp for each NAME.cu: the source for the host, and a registration of its kernels.
`.ci/cuda/card-nvcc` takes names and parameters from here.
"""

import pathlib
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
# What a kernel's source may include of the toolkit: all of it is sim.h.
HEADERS = [
    "cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h", "mma.h", "math_constants.h",
    "cuda_pipeline.h", "cuda/std/limits",
]  # fmt: skip
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\];")
WAITING = re.compile(r"__sync|__shfl|__ballot|__any_sync|__all_sync|__reduce|\bmma_\w+\(")
KERNEL = re.compile(r"(template\s*<[^>]*>\s*)?sim_entry\s+void\s+(\w+)\s*\(([^)]*)\)")
INCLUDE = re.compile(r'#\s*include\s+"([^"]+)"')
# A header of candle's with barriers in a function that its kernels do not call.
WITHOUT_BARRIERS = "cuda_utils.cuh"


def for_the_host(text):
    """A kernel's source with its dynamic shared memory as a pointer."""
    return DYNAMIC_SHARED.sub(r"\1 *\2 = (\1 *)sim_dynamic_shared();", text)


def write_toolkit(folder):
    """The headers that a source finds in the place of the toolkit's."""
    for name in HEADERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('#include "sim.h"\n')


def write_sources(folder, to):
    """The headers beside a kernel's source, which it includes by name."""
    to.mkdir(parents=True)
    for header in [*folder.glob("*.cuh"), *folder.glob("*.h")]:
        (to / header.name).write_text(for_the_host(header.read_text()))


def included(file):
    """What a .cpp file says to compile a kernel's source; closed by a brace."""
    return f'#include "sim.h"\nnamespace {{\n#include "{file.resolve()}"\n'


def kernels(file, compiler, toolkit):
    """The kernels of a source as (name, parameters, each a text)."""
    command = [*compiler, f"-I{toolkit}", f"-I{HERE}", "-E", "-P", "-D__global__=sim_entry", "-x", "c++", "-"]
    done = subprocess.run(command, input=included(file) + "}\n", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{file}:\n{done.stderr}")
    found = [(name, parameters) for template, name, parameters in KERNEL.findall(done.stdout) if not template]
    return [(name, split(parameters)) for name, parameters in found]


def split(parameters):
    """A parameter list at its commas, but for those within <>."""
    parts, depth = [""], 0
    for letter in parameters:
        depth += (letter == "<") - (letter == ">")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


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
    (out / "kernels").mkdir(parents=True)
    toolkit = out / "sources" / "toolkit"
    write_toolkit(toolkit)
    # A folder of sources each, since two may have a file of one name.
    folders = {folder: out / "sources" / str(i) for i, folder in enumerate(sorted({file.parent for file in files}))}
    for folder, to in folders.items():
        write_sources(folder, to)
    for i, file in enumerate(files):
        source = folders[file.parent] / file.name
        source.write_text(for_the_host(file.read_text()))
        fibers = str(waits(source)).lower()
        names = [name for name, _ in kernels(source, compiler, toolkit)]
        lines = "".join(f'    sim_add<{name}>("{name}", {fibers}, {name});\n' for name in names)
        registration = f"struct Start {{ Start() {{\n{lines}}} }} start;\n}}\n"
        (out / "kernels" / f"{i}_{file.stem}.cpp").write_text(included(source) + registration)
        print(f"{file.name}: {len(names)} kernels" + (" with barriers" if fibers == "true" else ""))


if __name__ == "__main__":
    main()
