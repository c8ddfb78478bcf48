#!/usr/bin/env bash
# Makes what `make test-arm` and `make test-x86` run emulated processors with, from the packages of this Debian or
# Ubuntu and from wheels of aarch64. Nothing outside FOLDER changes, and nothing needs root.
#
#   sysroot.sh qemu FOLDER                                QEMU's user-mode emulators: FOLDER/qemu-aarch64, qemu-x86_64
#   sysroot.sh arm FOLDER                                 Python and its libraries for aarch64: FOLDER/root
#   sysroot.sh wheels FOLDER ARM PYTHON REQUIREMENT...    what PYTHON's pip finds for the Python in ARM: FOLDER/site
#
# FOLDER/stamp is written last: a hash of this script, of the requirements and of the versions in ARM. A folder that has
# it is left as it is, any other is made anew, so that one whose making was interrupted is never used.
set -euo pipefail

fail() {
    echo "sysroot.sh: $*" >&2
    exit 1
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail "needs Linux on x86-64; this is $(uname -s) on $(uname -m)."
for tool in apt-get dpkg; do
    command -v $tool >/dev/null || fail "needs Debian or Ubuntu, whose packages it unpacks; there is no $tool here."
done

part=$1 folder=$2
shift 2
arm=${1:-} # of wheels alone
wanted=$(cat "$0" ${arm:+"$arm/versions"} - <<<"$part ${*:3}" | sha256sum)
[ "$(cat "$folder/stamp" 2>/dev/null)" != "$wanted" ] || exit 0

echo "making $folder"
rm -rf "$folder"
mkdir -p "$folder"/apt/{lists,archives}/partial
folder=$(cd "$folder" && pwd -P)
log=$folder/log
: >"$folder/apt/installed"

# apt as on an empty machine of one architecture: what is installed here does not count, so that `install` finds every
# library that is needed; of this machine it takes the addresses and the keys of the package lists.
apt() {
    local architecture=$1
    shift
    apt-get -q -y -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" \
        -o APT::Install-Recommends=false -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=true \
        -o Dir::State::Lists="$folder/apt/lists" -o Dir::State::Status="$folder/apt/installed" \
        -o Dir::Cache="$folder/apt" -o Dir::Cache::Archives="$folder/apt/archives" "$@" >>"$log" 2>&1
}

# Downloads packages and what they depend on, and unpacks all of them: unpack ARCHITECTURE FOLDER PACKAGE...
unpack() {
    local architecture=$1 into=$2 package
    shift 2
    apt "$architecture" update || fail "apt-get finds no package lists: is there a network? The reason is in $log."
    apt "$architecture" install --download-only "$@" ||
        fail "apt-get finds no $* for $architecture: is there a network, do apt's sources have it? See $log."
    mkdir -p "$into"
    for package in "$folder"/apt/archives/*.deb; do dpkg -x "$package" "$into"; done
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
    "$folder/qemu-aarch64" -version | sed -n 's/^qemu-aarch64 version \([0-9.]*\).*/qemu \1/p' >"$folder/versions"
    rm -rf "$folder/all"
}

make_arm() {
    local python glibc
    unpack arm64 "$folder/root" python3 libstdc++6 libgomp1
    [ -e "$folder/root/lib" ] || ln -s usr/lib "$folder/root/lib" # where packages no longer bring the link
    python=$(cd "$folder/root/usr/lib" && echo python3.[0-9]*)
    [ "${python#python3.}" -ge 11 ] 2>/dev/null ||
        fail "the packages have $python; Transom needs Python 3.11 or newer, and so a newer Debian or Ubuntu."
    glibc=$(dpkg-deb --field "$folder"/apt/archives/libc6_*.deb Version)
    printf 'python %s\nglibc %s\n' "${python#python}" "${glibc%%-*}" >"$folder/versions"
}

make_wheels() {
    local python=$2 version glibc tag
    shift 2
    version=$(sed -n 's/^python //p' "$arm/versions") glibc=$(sed -n 's/^glibc 2\.//p' "$arm/versions")
    local platforms=(--platform manylinux2014_aarch64)
    for tag in $(seq 17 "$glibc"); do platforms+=(--platform "manylinux_2_${tag}_aarch64"); done
    "$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$folder/site" \
        --only-binary=:all: "${platforms[@]}" --implementation cp --python-version "$version" \
        --abi "cp${version/./}" --abi abi3 --abi none "$@" >>"$log" 2>&1 ||
        fail "pip finds no wheels of $* for aarch64 and Python $version: is there a network? See $log."
}

"make_$part" "$@"
rm -rf "$folder/apt"
echo "$wanted" >"$folder/stamp"
