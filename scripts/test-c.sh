#!/usr/bin/env bash
# Builds and installs the C library, and tests it from C and C++.
#
#     scripts/test-c.sh [--install PREFIX]
#
# - builds libqkv.so and libqkv.a, and installs them with qkv.h and qkv.pc into a prefix: by `cargo cinstall` where cargo-c is
#   installed, else by a plain cargo build whose files it lays out in the same way;
# - compiles crates/capi/examples and crates/capi/tests/*.c with gcc and g++, all warnings being errors, against what
#   `pkg-config qkv` says, both with the shared and with the static library;
# - runs them all, and those in C under valgrind too;
# - checks that qkv.h is current and runs the crate's own tests (cargo test -p qkv-capi).
#
# What it needs and does not find (gcc, g++, pkg-config, valgrind) it installs with apt-get where it may.
# --install PREFIX: leaves the library there; otherwise the prefix is temporary.
#
# Prints a line per step and a closing line "N passed, N failed". Exit codes: 0 all passed, 1 something failed, 2 it could not
# be tested.
set -euo pipefail

cannot() {
    echo "test-c: $1" >&2
    exit 2
}

prefix=
case $# in
0) ;;
2) [ "$1" = --install ] || cannot "expected --install PREFIX" ;;
*) cannot "expected --install PREFIX, or nothing" ;;
esac
[ $# -eq 0 ] || prefix=$(realpath -m "$2")
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=${prefix:-$work/prefix}

# Tools.
missing=()
for tool in gcc g++ pkg-config valgrind; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "test-c: installing ${missing[*]}" >&2
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq >&2 && apt-get install -y -qq "${missing[@]}" >&2 || cannot "cannot install ${missing[*]}"
    else
        cannot "missing: ${missing[*]}"
    fi
fi
command -v cargo >/dev/null || cannot "cargo is missing"

passed=0
failed=0
# step NAME COMMAND...: runs it; its output is shown where it fails.
step() {
    local name=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $name"
        # What the programs themselves count.
        grep -E '^[a-z.]+: [0-9]+ passed, [0-9]+ failed$' "$work/log" | sed 's/^/        /' || true
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        sed 's/^/        /' "$work/log"
    fi
}

# The library, laid out as cargo-c does.
lay_out() {
    local built=${CARGO_TARGET_DIR:-target}/release version soname
    version=$(cargo pkgid -p qkv-capi | sed 's/.*[#@]//')
    # The name that programs are linked with holds the part of the version within which they stay compatible.
    soname=libqkv.so.${version%.*}
    cargo rustc --release -p qkv-capi --lib -- -C "link-arg=-Wl,-soname,$soname" || return 1
    mkdir -p "$prefix/lib/pkgconfig" "$prefix/include"
    cp "$built/libqkv_capi.so" "$prefix/lib/libqkv.so.$version"
    ln -sf "libqkv.so.$version" "$prefix/lib/$soname"
    ln -sf "libqkv.so.$version" "$prefix/lib/libqkv.so"
    cp "$built/libqkv_capi.a" "$prefix/lib/libqkv.a"
    cp crates/capi/include/qkv.h "$prefix/include/"
    cat >"$prefix/lib/pkgconfig/qkv.pc" <<PC
prefix=$prefix
libdir=\${prefix}/lib
includedir=\${prefix}/include

Name: qkv
Description: Attention on CPUs in one fused pass
Version: $version
Libs: -L\${libdir} -lqkv
Cflags: -I\${includedir}
Libs.private: -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc
PC
}
if cargo cinstall --version >/dev/null 2>&1; then
    step "install with cargo-c" cargo cinstall --release -p qkv-capi --prefix "$prefix" --libdir lib
else
    echo "test-c: cargo-c is not installed (cargo install cargo-c): laying the files out by hand" >&2
    step "build and lay out" lay_out
fi
[ "$failed" = 0 ] || { echo "$passed passed, $failed failed"; exit 1; }
for file in lib/libqkv.so lib/libqkv.a include/qkv.h lib/pkgconfig/qkv.pc; do
    step "installed $file" test -s "$prefix/$file"
done
step "exported names begin with qkv_" sh -c "
    nm -D --defined-only '$prefix/lib/libqkv.so' | awk '\$2 == \"T\" { print \$3 }' >'$work/names'
    test \"\$(grep -c ^qkv_ '$work/names')\" -gt 40 && ! grep -v ^qkv_ '$work/names'"

export PKG_CONFIG_PATH=$prefix/lib/pkgconfig LD_LIBRARY_PATH=$prefix/lib
read -ra shared <<<"$(pkg-config --cflags --libs qkv)"
read -ra cflags <<<"$(pkg-config --cflags qkv)"
read -ra private <<<"$(pkg-config --static --libs-only-l qkv | sed 's/-lqkv//')"
strict=(-O1 -g -Wall -Wextra -Werror -pedantic)

for source in crates/capi/examples/*.c crates/capi/tests/*.c; do
    name=$(basename "$source" .c)
    step "gcc $source" gcc -std=c11 "${strict[@]}" "$source" "${shared[@]}" -lm -o "$work/$name"
    step "gcc $source, static" \
        gcc -std=c11 "${strict[@]}" "$source" "${cflags[@]}" "$prefix/lib/libqkv.a" "${private[@]}" -lm -o "$work/$name-static"
    step "run $name" timeout 120 "$work/$name"
    step "run $name, static" timeout 120 "$work/$name-static"
    # Valgrind does not know AVX-512.
    isa=$(uname -m | sed 's/x86_64/avx2/; t; s/.*/portable/')
    step "valgrind $name" env QKV_ISA="$isa" RAYON_NUM_THREADS=2 timeout 600 valgrind -q --error-exitcode=9 \
        --leak-check=full --errors-for-leak-kinds=definite,indirect "$work/$name"
done
for source in crates/capi/examples/*.cpp; do
    name=$(basename "$source" .cpp)
    step "g++ $source" g++ -std=c++17 "${strict[@]}" "$source" "${shared[@]}" -o "$work/$name"
    step "run $name" timeout 120 "$work/$name"
done
step "an unknown QKV_ISA is refused" sh -c "
    ! QKV_ISA=nonsense '$work/attention' 2>'$work/isa' && grep QKV_ERROR_ISA '$work/isa'"
awk '/^```c$/ { on = 1; next } /^```$/ { on = 0 } on' docs/C.md >"$work/program.c"
step "gcc, the program of docs/C.md" gcc -std=c11 "${strict[@]}" "$work/program.c" "${shared[@]}" -o "$work/program"
step "run the program of docs/C.md" timeout 120 "$work/program"
# The header alone, twice, in both languages.
printf '#include <qkv.h>\n#include <qkv.h>\nint main(void) { return qkv_version() == 0; }\n' >"$work/twice.c"
step "the header in C11" gcc -std=c11 "${strict[@]}" "$work/twice.c" "${shared[@]}" -o "$work/twice"
step "the header in C++11" g++ -std=c++11 -x c++ "${strict[@]}" "$work/twice.c" "${shared[@]}" -o "$work/twice"

step "the crate's tests, the header's currency among them" cargo test --quiet -p qkv-capi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
