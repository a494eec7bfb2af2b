#!/usr/bin/env python3
"""Writes OUT/libcuda.a, OUT/libcublas.a, ...: archives whose functions open the real library when first called.

    lazy_libraries.py CUDARC_SOURCE OUT        (x86-64 Linux)

candle has cudarc link `-lcuda -lcublas -lcublasLt -lcurand -lnvrtc -lcudnn`. Linked with these archives in their place
the program names no CUDA library: it starts on any machine, and where a library is missing each of its functions
returns that library's "not initialised". Every function is a jump through a pointer, which leads to the resolver once
and to the library's own function from then on.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

# name for the linker: (file to open, module of cudarc, status to return where the file or a function is missing)
LIBRARIES = {
    "cuda": ("libcuda.so.1", "driver", 34),  # CUDA_ERROR_STUB_LIBRARY
    "nvrtc": ("libnvrtc.so.13", "nvrtc", 11),  # NVRTC_ERROR_INTERNAL_ERROR
    "curand": ("libcurand.so.10", "curand", 101),  # CURAND_STATUS_NOT_INITIALIZED
    "cublas": ("libcublas.so.13", "cublas", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": ("libcublasLt.so.13", "cublaslt", 1),
    "cudnn": ("libcudnn.so.9", "cudnn", 1001),  # CUDNN_STATUS_NOT_INITIALIZED
}

# Functions that return text, not a status; cuGet...String takes a pointer to it and returns a status.
TEXT = re.compile(r"(?!cuGet)\w*String$|nvrtcGetErrorString$")

RESOLVER = r"""
#include <dlfcn.h>
#include <stdint.h>
extern const char *const LIB_names[];
extern const char LIB_text[];
extern void *LIB_pointers[];

static int64_t missing_status(void) { return STATUS; }
static const char *missing_text(void) { return "FILE could not be opened"; }

void *LIB_resolve(long i) {
    void *library = dlopen("FILE", RTLD_NOW | RTLD_GLOBAL); /* opened once, counted after that */
    void *function = library ? dlsym(library, LIB_names[i]) : 0;
    if (!function) function = LIB_text[i] ? (void *)missing_text : (void *)missing_status;
    LIB_pointers[i] = function;
    return function;
}
"""

# Keeps every register that may hold an argument while the resolver runs; the function's number is on the stack.
FIRST_CALL = """
    .text
LIB_first_call:
    push %rdi; push %rsi; push %rdx; push %rcx; push %r8; push %r9; push %rax
    sub $136, %rsp
    movups %xmm0,0(%rsp); movups %xmm1,16(%rsp); movups %xmm2,32(%rsp); movups %xmm3,48(%rsp)
    movups %xmm4,64(%rsp); movups %xmm5,80(%rsp); movups %xmm6,96(%rsp); movups %xmm7,112(%rsp)
    mov 192(%rsp), %rdi
    call LIB_resolve
    mov %rax, %r11
    movups 0(%rsp),%xmm0; movups 16(%rsp),%xmm1; movups 32(%rsp),%xmm2; movups 48(%rsp),%xmm3
    movups 64(%rsp),%xmm4; movups 80(%rsp),%xmm5; movups 96(%rsp),%xmm6; movups 112(%rsp),%xmm7
    add $136, %rsp
    pop %rax; pop %r9; pop %r8; pop %rcx; pop %rdx; pop %rsi; pop %rdi
    add $8, %rsp
    jmp *%r11
"""


def functions(cudarc, module):
    text = (cudarc / "src" / module / "sys" / "mod.rs").read_text()
    blocks = re.findall(r'extern "C" \{(.*?)\n        \}', text, re.S)
    names = sorted({name for block in blocks for name in re.findall(r"\bfn (\w+)\(", block)})
    assert names, f"no functions found in cudarc's {module}"
    return names


def assembly(names):
    lines = [FIRST_CALL]
    for i, name in enumerate(names):
        lines.append(f"    .globl {name}\n    .type {name},@function\n{name}:\n    jmp *LIB_pointers+{8 * i}(%rip)")
        lines.append(f".Lfirst{i}:\n    pushq ${i}\n    jmp LIB_first_call")

    def table(label, section, entries):
        lines.append(f"    {section}\n    .balign 8\n    .globl {label}\n    .hidden {label}\n{label}:")
        lines.extend(entries)

    table("LIB_pointers", ".data", (f"    .quad .Lfirst{i}" for i in range(len(names))))
    table("LIB_names", '.section .data.rel.ro,"aw"', (f"    .quad .Lname{i}" for i in range(len(names))))
    table("LIB_text", ".section .rodata", (f"    .byte {int(bool(TEXT.match(name)))}" for name in names))
    lines.extend(f'.Lname{i}: .asciz "{name}"' for i, name in enumerate(names))
    lines.append('    .section .note.GNU-stack,"",@progbits\n')
    return "\n".join(lines)


def main():
    cudarc, out = map(pathlib.Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    for library, (file, module, status) in LIBRARIES.items():
        names = functions(cudarc, module)
        prefix = f"lazy_{library}"
        resolver = RESOLVER.replace("FILE", file).replace("STATUS", str(status))
        archive = (out / f"lib{library}.a").resolve()
        archive.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            (folder / "calls.s").write_text(assembly(names).replace("LIB_", f"{prefix}_"))
            (folder / "resolver.c").write_text(resolver.replace("LIB_", f"{prefix}_"))
            subprocess.run(["gcc", "-O2", "-fPIC", "-c", "calls.s", "resolver.c"], cwd=folder, check=True)
            subprocess.run(["ar", "crs", archive, "calls.o", "resolver.o"], cwd=folder, check=True)
        print(f"{archive}: {len(names)} functions of {file}")


main()
