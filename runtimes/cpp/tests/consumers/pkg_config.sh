#!/bin/sh
# A consumer that knows pkg-config alone: pkg_config.sh PREFIX CC SOURCE PROGRAM BUNDLE
set -eu
PKG_CONFIG_PATH=$(dirname "$(find "$1" -name tarflow.pc)")
export PKG_CONFIG_PATH
folder=$(pkg-config --variable=libdir tarflow)
# The words are split on purpose: they are options.
# shellcheck disable=SC2046
"$2" -std=c99 -Wall -Werror "$3" $(pkg-config --cflags --libs tarflow) -Wl,-rpath,"$folder" -o "$4"
"$4" "$5"
