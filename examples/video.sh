#!/bin/sh
# A video's frames upscaled, and a video made of them: the same frame rate, the sound as it was.
#
#     examples/video.sh in.mp4 out.mp4 [OPTIONS OF sd-upscale]
#
# Needs ffmpeg and ffprobe. Every frame starts from the same noise (one seed), so that what does not move does not flicker more than it must; the model
# knows nothing of time, so that texture it invents still does. Frames are PNG files in FRAMES (default: out.mp4.frames), which is kept where a
# run breaks off: the same command goes on from there. Videos of changing frame rate come out at their mean.
set -eu
from=${1:?a video} to=${2:?a video to write}
shift 2
frames=${FRAMES:-$to.frames}
begin=$(date +%s)
mkdir -p -- "$frames/in"

# As a fraction, such as 30000/1001; transport streams say it twice.
rate=$(ffprobe -v error -select_streams v:0 -show_entries stream=avg_frame_rate -of default=noprint_wrappers=1:nokey=1 "$from" | head -n 1)
if [ ! -e "$frames/in/whole" ]; then
  ffmpeg -v error -nostdin -y -i "$from" -map 0:v:0 -fps_mode passthrough "$frames/in/%06d.png"
  touch "$frames/in/whole"
fi
extracted=$(date +%s)
sd-upscale "$frames/in" -o "$frames/out" --seed 0 --skip-existing "$@"
upscaled=$(date +%s)
# Of the original everything but its pictures: sound, subtitles, chapters, tags.
ffmpeg -v error -nostdin -y -framerate "$rate" -i "$frames/out/%06d.png" -i "$from" \
  -map 0:v -map 1:a? -map 1:s? -c copy -c:v libx264 -crf 16 -pix_fmt yuv420p -map_metadata 1 -map_chapters 1 "$to"
encoded=$(date +%s)
rm -r -- "$frames"
echo "frames out $((extracted - begin)) s, upscaled $((upscaled - extracted)) s, frames in $((encoded - upscaled)) s" >&2
