#!/usr/bin/env bash
# The measurements that need a GPU, in order of use, each stopped after its minutes:
#
#     benchmarks/gpu_window.sh <folder> [row ...]
#
# Tables and logs go into the folder. Without a row, all run: 24 minutes. PYTHON is the interpreter. TINY=1 rehearses
# the commands at small shapes on a CPU.
set -u
cd "$(dirname "$0")/.." || exit
out=${1:?a folder for the results}
shift
rows=("${@:-1}")
[ $# -eq 0 ] && rows=(1 2 4 5 6 7 8 9)
mkdir -p "$out"
export PYTHONPATH=$PWD

run() { # minutes, name, command
  echo "$(date +%T) $2"
  timeout "$((60 * $1))" "${PYTHON:-python}" "${@:3}" >"$out/$2.log" 2>&1 || echo "$2: exit status $?; see $out/$2.log"
}
step="benchmarks/model_step.py --no-layers --rounds 5"
if [ -n "${TINY:-}" ]; then
  step="$step --size reduced --sequence-length 32 --batch-size 1 --rounds 1"
  memory="--size reduced --sequence-length 64 --batch-size 1" rounds="--rounds 1" sweep="--configurations 1" batches=14
  export TORCH_COMPILE_DISABLE=1
else
  step="$step --size 162m --batch-size 8"
  memory="" rounds="" sweep="" batches=30
fi
dated=$out/$(date +%F)
# Lists of options, which are to be split.
# shellcheck disable=SC2086
for row in "${rows[@]}"; do
  case $row in
    1) run 1 kernel-tests -m pytest -m gpu -q -p no:cacheprovider tests ;;
    # With the table of each model's kernels, which is row 3.
    2 | 3) run 4 step $step --no-peers --no-compiled --profile --out "$dated-step.csv" ;;
    4) run 1 sdpa benchmarks/sdpa.py $rounds --out "$dated-sdpa.csv" ;;
    5) run 4 blocks benchmarks/block_sweep.py $sweep --out "$dated-blocks.csv" ;;
    6) run 1 loss-head benchmarks/loss_head.py $rounds --out "$dated-loss-head.csv" ;;
    7) run 5 dense $step --compiled --profile --only dense,Hugging --out "$dated-dense.csv" ;;
    8)
      run 2 refresh $step --compiled --profile --only refresh --out "$dated-refresh.csv"
      run 1 residual $step --no-compiled --only dense,refresh --autocast-residual --out "$dated-residual.csv"
      run 2 memory benchmarks/memory.py $memory --out "$dated-memory.csv"
      ;;
    9)
      run 2 trainer benchmarks/trainer_step.py --batches "$batches" --out "$dated-trainer.csv"
      run 1 syncs benchmarks/host_syncs.py --batches 8 --out "$dated-syncs.csv"
      ;;
    *) echo "$row: no such row; 1 to 9" >&2 && exit 2 ;;
  esac
done
