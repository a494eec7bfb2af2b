#!/bin/sh
# ImageMagick before (any format it reads, turned upright, cropped, reduced) and exiftool after (the camera's tags on the result).
#
#     examples/imagemagick_exiftool.sh photo.heic photo-2x.jpg [OPTIONS OF sd-upscale]
#     GEOMETRY=512x512+100+50 examples/imagemagick_exiftool.sh photo.avif part-2x.png
#
# Needs ImageMagick 6 or 7 (with libheif for HEIC and AVIF) and exiftool. A PNG goes through the pipe, without loss; -auto-orient turns the pixels,
# and so the tag that says how to turn them must not be copied back.
set -eu
from=${1:?a picture} to=${2:?a picture to write}
shift 2
convert=$(command -v magick || command -v convert)
"$convert" "$from" -auto-orient ${GEOMETRY:+-crop "$GEOMETRY" +repage} PNG:- | sd-upscale - -o "$to" "$@"
# All of the original's but what is no longer true; UserComment and parameters are where sd-upscale wrote its settings.
exiftool -q -overwrite_original -TagsFromFile "$from" -all:all --Orientation --ThumbnailImage --PreviewImage \
  --ImageSize --ExifImageWidth --ExifImageHeight --XMP-tiff:ImageWidth --XMP-tiff:ImageHeight --ICC_Profile \
  --UserComment --PNG:Parameters "$to"
