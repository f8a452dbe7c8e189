#!/bin/sh
# Fetches the drawings that the vision tower learns from, with npm and apt-get, and unpacks them: sh smol/fetch.sh FOLDER
set -e
mkdir -p "$1"
cd "$1"
for package in noto@1.2.9 noto-v1@1.2.5 fluent-emoji@1.2.7 fluent-emoji-flat@1.2.6 twemoji@1.2.5 emojione@1.2.3; do
  style=${package%@*}
  test -d "$style" && continue
  file=$(npm pack --silent "@iconify-json/$package")
  mkdir "$style.new"
  tar -xzf "$file" -C "$style.new" --strip-components 1
  mv "$style.new" "$style"
  rm "$file"
done
if ! test -d openclipart; then
  apt-get download openclipart-svg
  dpkg-deb -x openclipart-svg_*.deb deb
  mv deb/usr/share/openclipart/svg openclipart
  rm -r deb openclipart-svg_*.deb
fi
