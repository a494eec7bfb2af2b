#!/bin/sh
# A folder's pictures shared out among several processes by GNU parallel: one a CUDA card, or with CARDS=0 JOBS of them on the CPU.
#
#     CARDS=8 examples/parallel.sh photos upscaled [OPTIONS OF sd-upscale]
#     CARDS=0 JOBS=2 examples/parallel.sh photos upscaled
#
# Needs GNU parallel. Which share a picture belongs to is a matter of its name, so that a run that broke off goes on where it was.
# Within one machine --device cuda:all does the same in one process; two processes on the CPU pay where pictures are small.
set -eu
from=${1:?a folder with pictures} to=${2:?a folder for the results}
shift 2
cards=${CARDS:-1}
if [ "$cards" -gt 0 ]; then
  jobs=$cards device=cuda:{}
else
  jobs=${JOBS:-2} device=cpu
fi
# -q: each argument stays one; the output of a process comes whole, with its number before each line.
seq 0 $((jobs - 1)) |
  parallel -q --tag -j "$jobs" sd-upscale -r "$from" -o "$to" --device "$device" --shard "{}/$jobs" --skip-existing "$@"
