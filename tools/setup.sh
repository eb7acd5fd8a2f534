#!/bin/sh
# tools/setup.sh LIST: installs the Debian packages of a list that are missing. make calls it. It does nothing if none is missing.
set -eu
missing=
while read -r package; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done < "$1"
[ -n "$missing" ] || exit 0
as_root=
if [ "$(id -u)" != 0 ]; then
  as_root=sudo
  command -v sudo >/dev/null || { echo "missing packages:$missing; install them as root and run make again" >&2; exit 1; }
fi
echo "installing:$missing"
$as_root apt-get update -q
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -q -y --no-install-recommends $missing
