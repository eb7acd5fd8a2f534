#!/bin/sh
# tools/sysroot.sh ARCHITECTURE LIST DIRECTORY: unpacks the Debian packages of a list, built for another architecture, under DIRECTORY. apt
# keeps its lists there too, so this machine's own packages, lists and architectures do not change. No root is needed.
set -eu
architecture=$1
packages=$(cat "$2")
rm -rf "$3"
mkdir -p "$3/apt/lists/partial" "$3/apt/archives/partial"
cd "$3/apt"
apt() {
  apt-get -q -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" -o APT::Sandbox::User= \
    -o Dir::State::Lists="$PWD/lists" -o Dir::State::Status=/dev/null -o Dir::Cache="$PWD" "$@"
}
apt update
apt download $packages
for package in *.deb; do dpkg-deb -x "$package" ..; done
rm -rf ../apt
