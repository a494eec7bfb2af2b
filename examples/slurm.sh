#!/bin/sh
#SBATCH --job-name=upscale
#SBATCH --array=0-7
# A folder's pictures shared out among the tasks of a Slurm array, however many there are.
#
#     sbatch --gres=gpu:1 examples/slurm.sh photos upscaled [OPTIONS OF sd-upscale]
#     sbatch --array=0-3 examples/slurm.sh photos upscaled --device cpu
#
# Nothing is coordinated between tasks: each takes its share of the names. The same command again does what is missing.
set -eu
from=${1:?a folder with pictures} to=${2:?a folder for the results}
shift 2
# Arrays need not begin at 0.
share=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
exec sd-upscale -r "$from" -o "$to" --shard "$share/$SLURM_ARRAY_TASK_COUNT" --skip-existing "$@"
