#!/usr/bin/env bash
# Everything a session on a GPU machine should do, in one command: build the extension against what is installed, run the
# GPU tests, then the benchmarks. Tables and logs land under ${OUT:-bench/results}. Runs without a package index.
#
#   WHEELS       folder of wheels this machine lacks (openslide-bin, openslide-python, ...); default .whl, if it is there
#   EXAONEPATH_TEST_DATA   golden files, where they are not at ../shared/data
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-bench/results}
mkdir -p "$out"
export OUT=$(cd "$out" && pwd) PYTHONUNBUFFERED=1 EXAONEPATH_BENCH=full EXAONEPATH_BENCH_SAVE=1
wheels=${WHEELS:-.whl}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
status=0

if compgen -G "$wheels/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl || exit 1
fi
EXAONEPATH_REQUIRE_EXTENSION=1 python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade \
  --target "$site" . >"$OUT/gpu_build.log" 2>&1 || { tail -40 "$OUT/gpu_build.log"; exit 1; }
export PYTHONPATH=$site

# Out of the repository, so that nothing is imported from its root by accident.
root=$PWD
cd "$site"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -m exaonepath doctor | tee "$OUT/gpu_doctor.txt"
python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -m gpu "$root/tests" 2>&1 \
  | tee "$OUT/gpu_tests.log" | tail -40 || status=1
python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -m gpu --benchmark-only "$root/bench" 2>&1 \
  | tee "$OUT/gpu_bench.log" | grep -A40 "ours against" || status=1
exit $status
