#!/bin/sh
# Prints the folder of ONNX Runtime's C and C++ headers; on Debian and where there are none, fetches them first.
#
#     fetch_onnxruntime_headers.sh [FOLDER]
#
# The wheels of ONNX Runtime come without headers, and Debian 12 has no package of them. A newer Debian has: this
# takes libonnxruntime-dev from there through the machine's own mirror and its keys, and unpacks it into FOLDER
# [default: the user's cache]. Nothing is installed, and apt's own lists and cache are left alone: any user may run it.
# With ONNXRUNTIME_INCLUDE_DIR set, or the package installed, it fetches nothing.
set -eu

package=libonnxruntime-dev
header=onnxruntime_cxx_api.h
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/tarflow/onnxruntime-headers}

fail() {
  printf 'error: %s\nhint: %s\n' "$1" \
    "unpack a release archive of ONNX Runtime and set ONNXRUNTIME_INCLUDE_DIR to its folder of $header" >&2
  exit 1
}

for found in "${ONNXRUNTIME_INCLUDE_DIR:-/usr/include/onnxruntime}" "$folder/usr/include/onnxruntime"; do
  if [ -f "$found/$header" ]; then
    echo "$found"
    exit
  fi
  [ -z "${ONNXRUNTIME_INCLUDE_DIR:-}" ] || fail "ONNXRUNTIME_INCLUDE_DIR is $found, which has no $header"
done
for tool in apt-get dpkg; do
  command -v $tool >/dev/null || fail "the headers of ONNX Runtime are missing, and there is no $tool to fetch them"
done
mirror=$(apt-get indextargets --no-release-info --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/$' | head -n 1)
[ -n "$mirror" ] || fail "the headers of ONNX Runtime are missing, and apt names no Debian mirror to fetch them from"

mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"

# Newest first; 23 is the oldest API that can register a provider's library, 21 all that the CPU needs.
for suite in forky trixie; do
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
  set -- -q -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none -o Acquire::Retries=3 \
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o APT::Update::Error-Mode=any \
    -o APT::Sandbox::User=root # the folder is this user's; what comes is checked by its signature
  if apt-get "$@" update >&2 && (cd "$work" && apt-get "$@" download "$package" >&2) &&
    dpkg -x "$work"/"$package"_*.deb "$work/unpacked"; then
    mv -T "$work/unpacked" "$folder" 2>/dev/null || [ -d "$folder" ] # another run may have been faster
    echo "$folder/usr/include/onnxruntime"
    exit
  fi
  echo "$suite does not offer $package here" >&2
done
fail "apt cannot fetch $package"
