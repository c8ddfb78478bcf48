#!/usr/bin/env bash
# Makes what `make test-arm` and `make test-x86` run emulated processors with, from the packages of this Debian or
# Ubuntu and from wheels of aarch64. Nothing outside FOLDER changes, and nothing in it runs as a service or as root.
#
#   sysroot.sh qemu FOLDER                          FOLDER/qemu-aarch64, FOLDER/qemu-x86_64: QEMU's user-mode emulators
#   sysroot.sh arm FOLDER PYTHON REQUIREMENT...     FOLDER/root: Python and its libraries for aarch64, out of packages;
#                                                   FOLDER/site: what PYTHON's pip finds for that Python
#
# FOLDER/stamp is written last: a hash of this script and its arguments. A folder that has it is left as it is, any
# other is made anew, so that one whose making was interrupted is never used. `cat FOLDER/versions` says what is in it.
set -euo pipefail

part=$1 folder=$2
shift 2
wanted=$(cat "$0" - <<<"$part $*" | sha256sum)
[ "$(cat "$folder/stamp" 2>/dev/null)" != "$wanted" ] || exit 0

fail() {
    echo "sysroot.sh: $*" >&2
    exit 1
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail "needs Linux on x86-64; this is $(uname -s) on $(uname -m)."
for tool in apt-get dpkg sha256sum; do
    command -v $tool >/dev/null || fail "needs Debian or Ubuntu, whose packages it unpacks; there is no $tool here."
done

rm -rf "$folder"
mkdir -p "$folder"/apt/{lists,archives}/partial
folder=$(cd "$folder" && pwd -P)
log=$folder/log
: >"$folder/apt/installed"

# apt as on an empty machine of one architecture: what is installed here does not count, so that `install` finds every
# library that is needed, and only the package lists' addresses and keys are this machine's.
apt() {
    local architecture=$1
    shift
    apt-get -q -y -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" \
        -o APT::Install-Recommends=false -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=true \
        -o Dir::State::Lists="$folder/apt/lists" -o Dir::State::Status="$folder/apt/installed" \
        -o Dir::Cache="$folder/apt" -o Dir::Cache::Archives="$folder/apt/archives" "$@" >>"$log" 2>&1
}

# Downloads packages and what they depend on, and unpacks the lot: unpack ARCHITECTURE FOLDER PACKAGE...
unpack() {
    local architecture=$1 into=$2 package
    shift 2
    apt "$architecture" update || fail "apt-get finds no package lists: is there a network? The reason is in $log."
    apt "$architecture" install --download-only "$@" ||
        fail "apt-get finds no $* for $architecture: do this machine's apt sources have it? The reason is in $log."
    mkdir -p "$into"
    for package in "$folder"/apt/archives/*.deb; do dpkg -x "$package" "$into"; done
}

# The version of an unpacked package, without the distribution's own part: version_of PACKAGE
version_of() {
    local package
    package=$(echo "$folder/apt/archives/$1"_*.deb)
    dpkg-deb --field "$package" Version | sed 's/^[0-9]*://; s/[-+].*//'
}

make_qemu() {
    local architecture binary
    # The binaries that need no library: "-static" in their names up to Debian 12 and Ubuntu 24.04, then no more.
    unpack amd64 "$folder/all" qemu-user-static
    for architecture in aarch64 x86_64; do
        for binary in "$folder/all/usr/bin/qemu-$architecture"{-static,}; do
            if [ -f "$binary" ] && [ ! -L "$binary" ]; then
                mv "$binary" "$folder/qemu-$architecture"
                break
            fi
        done
        "$folder/qemu-$architecture" -version >/dev/null 2>>"$log" ||
            fail "the package qemu-user-static has no qemu-$architecture that runs here. The reason is in $log."
    done
    echo "qemu $("$folder/qemu-aarch64" -version | sed -n 's/^qemu-aarch64 version \([0-9.]*\).*/\1/p')" >"$folder/versions"
    rm -rf "$folder/all"
}

make_arm() {
    local python=$1 release glibc tag
    shift
    local platforms=()
    unpack arm64 "$folder/root" python3 libstdc++6 libgomp1
    [ -e "$folder/root/lib" ] || ln -s usr/lib "$folder/root/lib" # where packages no longer bring the link
    release=$(cd "$folder/root/usr/lib" && echo python3.[0-9]*)
    release=${release#python3.}
    [ "$release" -ge 11 ] 2>/dev/null || fail "Python here is 3.$release; Transom needs 3.11: a newer Debian or Ubuntu."
    glibc=$(version_of libc6)
    for tag in $(seq 17 "${glibc#2.}"); do platforms+=(--platform "manylinux_2_${tag}_aarch64"); done
    "$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$folder/site" \
        --only-binary=:all: --platform manylinux2014_aarch64 "${platforms[@]}" --implementation cp \
        --python-version "3.$release" --abi "cp3$release" --abi abi3 --abi none "$@" >>"$log" 2>&1 ||
        fail "pip finds no wheels of $* for aarch64 and Python 3.$release: is there a network? The reason is in $log."
    printf 'python 3.%s\nglibc %s\n' "$release" "$glibc" >"$folder/versions"
}

"make_$part" "$@"
rm -rf "$folder/apt"
echo "$wanted" >"$folder/stamp"
