#!/usr/bin/env bash
# Fifteen minutes on a rented GPU, in phases that stand on their own: correct? fits? how fast? tuning.
#
#   bench/gpu_session.sh [--rehearse] first|second|all|PHASE...
#
#   first    correct, fits, fast: ten minutes                second   tune, loss, pipeline, sanitize: five minutes
#   all      first, then second
#
#   correct   170 s   pytest -m gpu in many processes; tests.jsonl has every outcome and why
#   fits       90 s   the slide encoder in 12 GB: 100,000 to 1,000,000 patches, inference and training
#   fast      240 s   attention compared with the strongest peers: one segment, 100 equal, 1,000 skewed fragments
#   tune      110 s   eight launch settings a kernel           loss       60 s   the sigmoid loss, and its tiles
#   pipeline   60 s   patches to features                      sanitize   60 s   compute-sanitizer, memcheck and racecheck
#
# Each phase ends within its seconds (PHASE_SECONDS sets others). Rows are saved as they come, into ${OUT:-bench/results}: at
# most eight files. A phase that is called again measures only what is missing (rows of the same code and card).
# targets.md says for each target whether it was met.
#
# What has to travel to a machine without a network (64 MB were enough), and where it is expected:
#   the working tree                 without .venv and build/
#   wheels in ${WHEELS:-.whl}        openslide-bin, openslide-python; for `pipeline` also imagecodecs (28 MB); for the peer
#                                    FlashAttention 3 fa3-fwd (28 MB)
#   golden data, 8 MB                golden/ and weights.py, in ../shared/data, shared/data or $EXAONEPATH_TEST_DATA
# There: Python 3.10 or later with torch, triton, transformers, h5py, opencv, pytest, pytest-xdist, pytest-benchmark; nvcc, cmake and
# pybind11 for the CUDA half of the extension.
#
# --rehearse runs the phases without a GPU, in sizes of seconds on the CPU; nothing is saved, and no limit of time holds.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
began=$SECONDS

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }

declare -A limit=([correct]=170 [fits]=90 [fast]=240 [tune]=110 [loss]=60 [pipeline]=60 [sanitize]=60)
rehearse=0
phases=()
for word in "$@"; do
  case $word in
    -h | --help) usage; exit 0 ;;
    --rehearse) rehearse=1 ;;
    first) phases+=(correct fits fast) ;;
    second) phases+=(tune loss pipeline sanitize) ;;
    all) phases+=(correct fits fast tune loss pipeline sanitize) ;;
    *)
      [ -n "${limit[$word]:-}" ] || { echo "no phase is called '$word'" >&2; usage >&2; exit 2; }
      phases+=("$word") ;;
  esac
done
[ ${#phases[@]} -gt 0 ] || phases=(correct fits fast tune loss pipeline sanitize)

out=${OUT:-bench/results}
[ "$rehearse" = 1 ] && out=${OUT:-$(mktemp -d)}
mkdir -p "$out" || exit 1
OUT=$(cd "$out" && pwd)
root=$PWD
python=${PYTHON:-python3}
[ -z "${EXAONEPATH_TEST_DATA:-}" ] && [ -d shared/data ] && export EXAONEPATH_TEST_DATA=$root/shared/data
export OUT PYTHONUNBUFFERED=1 EXAONEPATH_BENCH_RESUME=1
log=$OUT/session.log
if [ "$rehearse" = 0 ]; then
  command -v nvidia-smi >/dev/null || { echo "no NVIDIA GPU here; --rehearse runs the phases without one" >&2; exit 3; }
  export EXAONEPATH_BENCH=${EXAONEPATH_BENCH:-short} EXAONEPATH_BENCH_SAVE=1
fi
export EXAONEPATH_BENCH_COMMIT=${EXAONEPATH_BENCH_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}

say() { printf '[%3d s] %s\n' $((SECONDS - began)) "$*" | tee -a "$log"; }

# The package goes into a folder of its own, which is used again as long as its sources stay the same. Python files are
# copied, the extension is built for the card at hand: half a minute with 16 cores.
install() {
  local state site wheels=${WHEELS:-.whl}
  state=$(find exaonepath kernels csrc setup.py pyproject.toml CMakeLists.txt "$wheels" -type f \
    \( -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.to*' -o -name '*.txt' -o -name '*.whl' \) \
    -exec sha256sum {} + 2>/dev/null | sort | sha256sum | cut -c1-12)
  site=$root/build/gpu-site-$state
  if [ ! -f "$site/.complete" ]; then
    say "installing into ${site#"$root"/}"
    rm -rf "$site"
    mkdir -p "$root/build"
    if compgen -G "$wheels/*.whl" >/dev/null; then
      "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl 2>&1 | tee -a "$log"
      [ "${PIPESTATUS[0]}" = 0 ] || return 1
    fi
    CUDAARCHS=${CUDAARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)} \
      EXAONEPATH_REQUIRE_EXTENSION=1 timeout 300 "$python" -m pip install -q --no-index --no-deps --no-build-isolation \
      --upgrade --target "$site" . >"$site.log" 2>&1 || { tail -40 "$site.log" | tee -a "$log"; return 1; }
    touch "$site/.complete"
  fi
  export PYTHONPATH=$site
  if ! (cd "$site" && "$python" -c 'import exaonepath') >>"$log" 2>&1; then
    tail -3 "$log"
    say "exaonepath cannot be imported; if openslide is missing, put wheels of openslide-python and openslide-bin into .whl"
    return 1
  fi
  local why
  why=$(cd "$site" && "$python" -c 'from exaonepath.ops.extension import why_no_cuda_half as why; print(why())')
  [ -z "$why" ] || { say "no CUDA half of the extension: $why"; return 1; }
}

# in_site SECONDS COMMAND...: out of the repository, so that nothing is imported from its root by accident.
in_site() {
  local seconds=$1 status
  shift
  (cd "$PYTHONPATH_FIRST" && EXAONEPATH_BENCH_SECONDS=$((seconds > 30 ? seconds - 15 : seconds)) timeout -k 10 "$seconds" "$@") \
    2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  [ "$status" = 124 ] && say "cut off after $seconds s; call this phase again to go on"
  [ "$status" = 5 ] && status=0 # pytest: nothing matched, which is no failure of the phase
  return "$status"
}

tests() { # SECONDS ARGUMENTS...
  local seconds=$1
  shift
  in_site "$seconds" "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider "$@"
}

# Benchmarks: a candidate that takes the CUDA context with it is left out, and the rest goes on in a new process.
bench() { # SECONDS ARGUMENTS...
  local end=$((SECONDS + $1)) status which="not gpu"
  shift
  [ "$rehearse" = 1 ] || which=gpu
  while :; do
    tests $((end - SECONDS)) -q --benchmark-only --benchmark-columns=median,rounds -m "$which" "$@"
    status=$?
    [ "$status" = 86 ] && [ $((end - SECONDS)) -gt 30 ] || break
    EXAONEPATH_BENCH_WITHOUT=$(paste -sd, "$OUT/lost_device.txt")
    export EXAONEPATH_BENCH_WITHOUT
    say "going on without $EXAONEPATH_BENCH_WITHOUT, which lost the CUDA context"
  done
  return "$status"
}

run_phase() { # NAME SECONDS
  local seconds=$2 workers small=()
  [ "$rehearse" = 1 ] && small=(-k "forward and (n200 or n512)")
  case $1 in
    correct)
      if [ "$rehearse" = 1 ]; then
        tests "$seconds" -q "$root/tests/ops/attention/test_tiles.py"
        return
      fi
      workers=$(($(nproc) > 2 ? $(nproc) - 2 : 1))
      # The kernels first. cuDNN would make a plan for every shape of the comparisons.
      PYTHONPATH=$PYTHONPATH:$root/bench TORCH_CUDNN_SDPA_DEPRIORITIZED=1 tests "$seconds" -q -p harness.outcomes -n "$workers" \
        --dist load --max-worker-restart 40 -m gpu -k "not sanitizer" --continue-on-collection-errors \
        "$root/tests/ops" "$root/tests/encoders" "$root/tests/slides" ;;
    fits)
      # What training frees between blocks of other sizes is then given back; both names, old and new.
      PYTORCH_ALLOC_CONF=expandable_segments:True PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        bench "$seconds" "${small[@]}" "$root/bench/test_encoder_scaling.py" ;;
    fast) bench "$seconds" "${small[@]}" "$root/bench/test_fragment_attention.py" ;;
    tune)
      if [ "$rehearse" = 1 ]; then
        TRITON_INTERPRET=1 in_site "$seconds" "$python" "$root/bench/tune.py" --device cpu --dtype float32 --problem 20:1 \
          --most 1 --rounds 1
      else
        in_site "$seconds" "$python" "$root/bench/tune.py" --seconds $((seconds - 10))
      fi ;;
    loss)
      bench $((seconds / 2)) -k "torch_backend and ($([ "$rehearse" = 1 ] && echo B512 || echo "B32768-d512 or B8192-d256"))" \
        "$root/bench/test_sigmoid_loss.py" || return
      in_site $((seconds / 2)) "$python" "$root/bench/tune_loss.py" --seconds $((seconds / 2 - 5)) \
        --device "$([ "$rehearse" = 1 ] && echo cpu || echo cuda)" ;;
    pipeline)
      if [ "$rehearse" = 1 ]; then
        bench "$seconds" -k "stand_ins and encoder" "$root/bench/test_feature_pipeline.py"
      else
        bench "$seconds" "$root/bench/test_feature_pipeline.py"
      fi ;;
    sanitize)
      [ "$rehearse" = 1 ] || tests "$seconds" -q -n 2 -m gpu -k sanitizer "$root/tests/ops/attention/test_triton_on_a_card.py" ;;
  esac
}

if [ "$rehearse" = 1 ]; then
  PYTHONPATH_FIRST=$(mktemp -d)
else
  command -v nvcc >/dev/null || export PATH=/usr/local/cuda/bin:$PATH
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$log"
  install || { say "the installation failed"; exit 1; }
  PYTHONPATH_FIRST=$PYTHONPATH
fi

failed=()
for name in "${phases[@]}"; do
  seconds=${PHASE_SECONDS:-${limit[$name]}}
  [ "$rehearse" = 1 ] && seconds=${PHASE_SECONDS:-900} # a slow machine is no failure of the rehearsal
  say "phase $name, at most $seconds s"
  run_phase "$name" "$seconds"
  status=$?
  say "phase $name ended with status $status"
  [ "$status" = 0 ] || failed+=("$name")
done
rm -f "$OUT/lost_device.txt"
(cd "$PYTHONPATH_FIRST" && "$python" "$root/bench/targets.py" "$OUT" >"$OUT/targets.md" && cat "$OUT/targets.md") | tee -a "$log"
if [ ${#failed[@]} -gt 0 ]; then
  say "failed or cut off: ${failed[*]}"
  exit 1
fi
