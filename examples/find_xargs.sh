#!/bin/sh
# Pictures that `find` finds, whatever their names are: spaces, line breaks and leading dashes are safe.
#
#     examples/find_xargs.sh photos upscaled [OPTIONS OF sd-upscale]
#
# Needs find and xargs with -print0 and -0 (GNU, BSD, busybox). Here: PNG and JPEG files that were changed within a week. xargs starts one process for
# hundreds of files, so that the model is loaded once, and ends in 123 where one of them failed. The results lie in one folder: two pictures of one name
# are refused.
set -eu
from=${1:?a folder with pictures} to=${2:?a folder for the results}
shift 2
mkdir -p -- "$to"
# Options come first: behind -- everything is a file.
find "$from" -type f \( -iname '*.png' -o -iname '*.jpg' \) -mtime -7 -print0 |
  xargs -0 -r sd-upscale --output="$to" "$@" --
