#!/bin/sh
# Writes the JPEG XL files of files/ by libjxl's encoder (cjxl 0.7, Debian's package libjxl-tools): lossless from the PNG files there, a
# JPEG as it is with its EXIF, the same coded anew, and an animation.
set -eu
cd "$(dirname "$0")/files"
for name in gray gray-alpha one-bit rgb16 rgba; do
    cjxl --quiet -d 0 "$name.png" "$name.jxl"
done
cjxl --quiet -j 1 orientation-6.jpg transcoded.jxl
cjxl --quiet -d 1 rgb.png lossy.jxl
cjxl --quiet -d 0 animated.gif animated.jxl
