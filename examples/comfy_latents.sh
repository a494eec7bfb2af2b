#!/bin/sh
# Every latent that ComfyUI's SaveLatent node wrote, upscaled: to pictures, or with FORMAT=latent to files for its LoadLatent node.
#
#     examples/comfy_latents.sh ComfyUI/output/latents upscaled [OPTIONS OF sd-upscale]
#     FORMAT=latent examples/comfy_latents.sh ComfyUI/output/latents ComfyUI/input
#
# The workflow is in the file, so that the prompt is found without -p; the kind of file says the latents' scale.
set -eu
from=${1:?the folder with .latent files} to=${2:?a folder for the results}
shift 2
exec sd-upscale "$from" --include '*.latent' -o "$to" --format "${FORMAT:-png}" --skip-existing "$@"
