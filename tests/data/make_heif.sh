#!/bin/sh
# Writes heif/ by libheif's encoder (heif-enc 1.15, Debian's package libheif-examples) from the PNG files of files/, and what its own
# decoder (heif-convert) reads from them as PNG. In a folder of their own: what is damaged at random is not given to a library in C.
set -eu
cd "$(dirname "$0")"
heif-enc -q 90 files/rgb.png -o heif/rgb.heic
heif-enc -q 90 files/gray.png -o heif/gray.heic
heif-enc -q 90 -b 10 files/rgb16.png -o heif/rgb10.heic
heif-enc -A -q 90 files/rgba.png -o heif/rgba.avif
for name in rgb.heic gray.heic rgb10.heic; do
    heif-convert "heif/$name" "heif/$name.png"
done
