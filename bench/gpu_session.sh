#!/usr/bin/env bash
# What a session on a GPU machine should do, phase by phase; each phase ends within PHASE_SECONDS and prints as it goes.
#
#   bench/gpu_session.sh [--rehearse] [tests|kernels|encoder|loss|pipeline|sanitize|tune|tune_loss|all] [pytest arguments ...]
#
#   tests      pytest -m gpu: correctness on the card            kernels    attention beside every peer, most valuable first
#   encoder    the whole slide encoder, memory in 12 GB          loss       the sigmoid loss (where its benchmark exists)
#   pipeline   the other benchmarks                              sanitize   compute-sanitizer over the kernels' small tests
#   tune       a sweep of launch settings; not part of all       tune_loss  tiles of the loss, in 40 s; not part of all
#   all        all but tune and tune_loss, one after the other
#
# Results land under ${OUT:-bench/results}: tables (*.jsonl, appended to), session.log, summary.md, plots.tar.gz. A phase that
# was cut off goes on where it stopped when it is called again (rows of the same code and card are not measured twice; where
# $OUT is emptied in between, append its tables to bench/results/ first). The loss and the pipeline save each row
# as it is measured, and start over.
#   WHEELS                 folder of wheels this machine lacks (openslide-bin, ...); default .whl, if it is there
#   EXAONEPATH_TEST_DATA   golden files (golden/, weights.py), where they are neither at ../shared/data nor at shared/data
#   PHASE_SECONDS          default 560; where one phase is asked for, installing counts
# --rehearse runs the phases without a card, in seconds: tiny sizes on the CPU, nothing saved.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }

rehearse=0
phase=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --rehearse) rehearse=1; shift ;;
    tests | kernels | encoder | loss | pipeline | sanitize | tune | tune_loss | all) phase=$1; shift; break ;;
    *) echo "no phase is called '$1'" >&2; usage >&2; exit 2 ;;
  esac
done
phase=${phase:-all}
extra=("$@")
seconds=${PHASE_SECONDS:-560}

out=${OUT:-bench/results}
[ "$rehearse" = 1 ] && out=${OUT:-$(mktemp -d)}
mkdir -p "$out" || exit 1
OUT=$(cd "$out" && pwd)
root=$PWD
[ -z "${EXAONEPATH_TEST_DATA:-}" ] && [ -d shared/data ] && export EXAONEPATH_TEST_DATA=$root/shared/data
export OUT PYTHONUNBUFFERED=1 EXAONEPATH_BENCH_RESUME=1
log=$OUT/session.log
device=gpu
if [ "$rehearse" = 1 ]; then
  device="not gpu"
else
  command -v nvidia-smi >/dev/null || { echo "no NVIDIA GPU here; --rehearse runs the phases without one" >&2; exit 3; }
  export EXAONEPATH_BENCH=full EXAONEPATH_BENCH_SAVE=1
fi
export EXAONEPATH_BENCH_COMMIT=${EXAONEPATH_BENCH_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" | tee -a "$log"; }

# The package goes into a folder of its own, kept from one call to the next while its sources stay the same.
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
      python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl 2>&1 | tee -a "$log"
      [ "${PIPESTATUS[0]}" = 0 ] || return 1
    fi
    EXAONEPATH_REQUIRE_EXTENSION=1 timeout 400 python3 -m pip install -q --no-index --no-deps --no-build-isolation \
      --upgrade --target "$site" . >"$site.log" 2>&1
    local status=$?
    tail -5 "$site.log" >>"$log"
    [ $status = 0 ] || { tail -40 "$site.log"; return 1; }
    touch "$site/.complete"
  fi
  export PYTHONPATH=$site
  if ! (cd "$site" && python3 -c 'import exaonepath') >>"$log" 2>&1; then
    tail -3 "$log"
    say "exaonepath cannot be imported; if openslide is missing, put wheels of openslide-python and openslide-bin into .whl"
    return 1
  fi
  local why
  why=$(cd "$site" && python3 -c 'from exaonepath.ops.extension import why_no_cuda_half as why; print(why())')
  [ -z "$why" ] || { say "no CUDA half of the extension: $why"; return 1; }
}

# run_pytest SECONDS ARGUMENTS...: out of the repository, so that nothing is imported from its root by accident.
run_pytest() {
  local limit=$1 status
  shift
  (cd "$PYTHONPATH" && EXAONEPATH_BENCH_SECONDS=$((limit > 60 ? limit - 45 : limit)) timeout -k 10 "$limit" \
    python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -v "$@" ${extra[@]+"${extra[@]}"}) \
    2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  [ "$status" = 124 ] && say "cut off after $limit s; call this phase again to go on"
  # 5: nothing matched, which is no failure of the phase.
  [ "$status" = 5 ] && status=0
  return "$status"
}

# Benchmarks: a candidate that takes the CUDA context with it is left out, and the rest goes on in a new process.
run_bench() {
  local limit=$1 end lost status
  shift
  end=$((SECONDS + limit))
  while :; do
    run_pytest $((end - SECONDS)) --benchmark-only --benchmark-columns=median,rounds -m "$device" "$@"
    status=$?
    [ "$status" = 86 ] && [ $((end - SECONDS)) -gt 60 ] || break
    lost=$(paste -sd, "$OUT/lost_device.txt")
    export EXAONEPATH_BENCH_WITHOUT=$lost
    say "going on without $lost, which lost the CUDA context"
  done
  return "$status"
}

sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || true
  if [ -z "$tool" ]; then
    say "compute-sanitizer is not installed here"
    return 0
  fi
  # Without torch's caching allocator every tensor has its own bounds.
  (cd "$PYTHONPATH" && PYTORCH_NO_CUDA_MEMORY_CACHING=1 EXAONEPATH_SANITIZE=1 timeout -k 10 "$1" "$tool" --tool memcheck \
    --launch-timeout 60 --error-exitcode 9 python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider -v -m gpu "$root"/tests/ops/attention/test_triton_attention.py "$root"/tests/ops/sigmoid_loss/test_*.py \
    ${extra[@]+"${extra[@]}"}) 2>&1 | tee -a "$log"
  return "${PIPESTATUS[0]}"
}

run_phase() {
  case $1 in
    tests)
      local where=$root/tests
      [ "$rehearse" = 1 ] && where=$root/tests/ops/attention/test_tiles.py
      # One broken file must not take the others with it; and cuDNN would make a plan for every shape of the comparisons.
      TORCH_CUDNN_SDPA_DEPRIORITIZED=1 run_pytest "$seconds" --continue-on-collection-errors -m "$device" "$where" ;;
    kernels) run_bench "$seconds" "$root/bench/test_fragment_attention.py" ;;
    encoder)
      # What training frees between blocks of other sizes is then given back; both names, old and new.
      PYTORCH_ALLOC_CONF=expandable_segments:True PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True run_bench "$seconds" "$root/bench/test_encoder_scaling.py" ;;
    loss)
      if [ -f "$root/bench/test_sigmoid_loss.py" ]; then
        run_bench "$seconds" "$root/bench/test_sigmoid_loss.py"
      else
        say "bench/test_sigmoid_loss.py is not there yet"
      fi ;;
    pipeline)
      [ "$rehearse" = 1 ] && return 0
      run_bench "$seconds" "$root"/bench/test_feature_pipeline.py "$root"/bench/test_patch_encoder.py \
        "$root"/bench/test_slide_encoder.py "$root"/bench/test_accuracy.py ;;
    sanitize) [ "$rehearse" = 1 ] || sanitize "$seconds" ;;
    tune)
      if [ "$rehearse" = 1 ]; then
        (cd "$PYTHONPATH" && OUT=$(mktemp -d) TRITON_INTERPRET=1 python3 "$root/bench/tune.py" --device cpu --dtype float32 \
          --problem 48:2 --most 2 --rounds 1 ${extra[@]+"${extra[@]}"}) 2>&1 | tee -a "$log"
      else
        (cd "$PYTHONPATH" && timeout -k 10 "$seconds" python3 "$root/bench/tune.py" --seconds $((seconds < 110 ? seconds : 110)) \
          ${extra[@]+"${extra[@]}"}) 2>&1 | tee -a "$log"
      fi
      return "${PIPESTATUS[0]}" ;;
    tune_loss)
      local where=cuda
      [ "$rehearse" = 1 ] && where=cpu
      (cd "$PYTHONPATH" && timeout -k 10 "$seconds" python3 "$root/bench/tune_loss.py" --device "$where" \
        ${extra[@]+"${extra[@]}"}) 2>&1 | tee -a "$log"
      return "${PIPESTATUS[0]}" ;;
  esac
}

# Few files, so that all of them come back: the tables, one log, one summary, one archive of plots.
gather() {
  local plots
  rm -f "$OUT/lost_device.txt"
  plots=$(mktemp -d)
  (cd "$PYTHONPATH" && python3 "$root/bench/report.py" "$OUT" >"$OUT/summary.md" && python3 "$root/bench/plots.py" --out "$plots" "$OUT") \
    2>&1 | tee -a "$log"
  if compgen -G "$plots/*.png" >/dev/null; then
    tar -czf "$OUT/plots.tar.gz" -C "$plots" .
  fi
  rm -rf "$plots"
}

if [ "$rehearse" = 1 ]; then
  export PYTHONPATH=${PYTHONPATH:-$(mktemp -d)}
else
  command -v nvcc >/dev/null || export PATH=/usr/local/cuda/bin:$PATH
  python3 -c 'import setuptools, sys; print("setuptools", setuptools.__version__, "python", sys.version.split()[0])' | tee -a "$log"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$log"
  install || { say "the installation failed"; exit 1; }
  (cd "$PYTHONPATH" && timeout 60 python3 -m exaonepath doctor) 2>&1 | tee -a "$log"
fi

if [ "$phase" = all ] && [ "$rehearse" = 0 ]; then
  say "all phases take up to $((6 * seconds)) s; where a command may run for less, ask for one phase at a time"
fi
[ "$phase" = all ] || seconds=$((seconds - SECONDS))
phases=("$phase")
[ "$phase" = all ] && phases=(tests kernels encoder loss pipeline sanitize)
failed=()
for name in "${phases[@]}"; do
  say "phase $name, at most $seconds s"
  run_phase "$name"
  status=$?
  say "phase $name ended with status $status"
  [ "$status" = 0 ] || failed+=("$name")
done
[ "$rehearse" = 1 ] || gather
if [ ${#failed[@]} -gt 0 ]; then
  say "failed: ${failed[*]}"
  exit 1
fi
