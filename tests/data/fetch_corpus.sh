#!/bin/sh
# Fetches the test pictures of other programs for tests/library/corpus.rs, by package name only: Debian's source packages with
# apt-get (Debian or Ubuntu, no root, the system's own lists are left alone) and Pillow's sdist with pip. About 300 MB of
# downloads; the pictures, some 4,000 files, go to FOLDER/PACKAGE/.
#
#     tests/data/fetch_corpus.sh FOLDER
#     python tests/data/corpus_reference.py FOLDER
#     SD_UPSCALE_CORPUS=FOLDER cargo test --release corpus
set -eu
folder=${1:?usage: tests/data/fetch_corpus.sh FOLDER}
mkdir -p "$folder/.fetch/lists/partial" "$folder/.fetch/cache/archives/partial"
folder=$(cd "$folder" && pwd)
work=$folder/.fetch

# The system's package sources, with source packages instead of built ones.
cat /etc/apt/sources.list.d/*.sources 2>/dev/null | sed 's/^Types: .*/Types: deb-src/' > "$work/corpus.sources"
sed -n 's/^deb /deb-src /p' /etc/apt/sources.list > "$work/corpus.list" 2>/dev/null || true
mkdir -p "$work/parts"
mv "$work/corpus.sources" "$work/corpus.list" "$work/parts/"
cat > "$work/apt.conf" <<CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$work/parts";
Dir::State::lists "$work/lists";
Dir::Cache "$work/cache";
CONF
export APT_CONFIG="$work/apt.conf"
apt-get update

# unpack ARCHIVE NAME: its pictures to FOLDER/NAME/, the rest nowhere.
unpack() {
    mkdir -p "$folder/$2"
    tar -xf "$1" -C "$folder/$2" --strip-components=1 --wildcards --no-anchored --ignore-case --no-wildcards-match-slash \
        '*.png' '*.apng' '*.jpg' '*.jpeg' '*.jpe' '*.jfif' '*.webp' '*.tif' '*.tiff' '*.bmp' '*.dib' '*.gif' 2>/dev/null || true
}

for package in tiff libpng1.6 libwebp giflib libimage-exiftool-perl imagemagick graphicsmagick libjpeg-turbo libgd2 \
    gdk-pixbuf imlib2 leptonlib golang-golang-x-image rust-tiff rust-png qtimageformats-opensource-src \
    qtbase-opensource-src python-imageio skimage libsdl2-image exiv2; do
    mkdir -p "$work/$package"
    (cd "$work/$package" && apt-get source --tar-only --download-only "$package" > log 2>&1) || echo "$package: not fetched"
    for archive in "$work/$package"/*.tar.*; do
        case $archive in *.asc | *debian.tar*) continue ;; esac
        unpack "$archive" "$package"
    done
done
mkdir -p "$work/pip"
python3 -m pip download --quiet --no-deps --no-binary pillow --dest "$work/pip" pillow || echo "pillow's sdist: not fetched"
for archive in "$work"/pip/*.tar.gz; do
    [ -e "$archive" ] && unpack "$archive" pillow-sdist
done
find "$folder" -mindepth 1 -type d -empty -not -path "$work/*" -delete
find "$folder" -path "$work" -prune -o -type f -print | wc -l
