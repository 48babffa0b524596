#!/usr/bin/env bash
# What eight GPUs of one host do: training of 1.3B and 14B over 1, 2, 4, 8 of them, and one stream of 14B on all.
#
#   bash runs/eight_gpus.sh            8 GPUs of 140 GB; random weights, nothing is fetched; writes runs/eight_gpus
#   GPUS=4 OUT=runs/four_gpus bash runs/eight_gpus.sh    the same with the GPUs that there are
#   bash runs/eight_gpus.sh --smoke    the same path in miniature, by 4 processes on a CPU; writes runs/eight_gpus-smoke
#
# What matters most is measured first, and every number is written when it is there: run it again to go on where it
# stopped, or to try again what failed. OUT names another folder, BUDGET the seconds of one start (0: no end).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/eight_gpus} gpus=${GPUS:-8} budget=${BUDGET:-0} failed=0 model=wan-14b
train=() watch=() precisions=(bf16 fp8-attention)
export PYTHONPATH=${PYTHONPATH:-src} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "${1:-}" = "--smoke" ]; then
  out=${OUT:-runs/eight_gpus-smoke} gpus=${GPUS:-4} model=tiny train=(--tiny) watch=(--height 64 --width 64 --device cpu)
  precisions=(bf16) # the others need a GPU
fi
mkdir -p "$out"

left() { # seconds of the budget, at least 1; a year where there is none
  local seconds=$(((budget > 0 ? budget : 31536000) - SECONDS))
  echo $((seconds > 1 ? seconds : 1))
}
training() { # training OPTION ... --sections SECTION ...
  echo "== training $* ($(date +%T))"
  python3 benchmarks/training_gpus.py --gpus "$gpus" --out "$out/training.json" --budget "$(left)" \
    ${train[@]+"${train[@]}"} "$@" >>"$out/training.log" 2>&1 || failed=1
}
stream() { # stream PRECISION: on one GPU, then on all, whose latents are compared with that one's
  for count in 1 "$gpus"; do
    [ ! -f "$out/$1/$model-$count.json" ] || continue
    echo "== stream $1, $count ($(date +%T))"
    timeout -k 30 "$(left)" python3 -m torch.distributed.run --standalone --nproc_per_node="$count" \
      benchmarks/multi_gpu.py --models "$model" --noise --precision "$1" --out "$out/$1" ${watch[@]+"${watch[@]}"} \
      >>"$out/stream.log" 2>&1 || failed=1
  done
}

training --sections data
stream "${precisions[0]}"
training --warmup 1 --runs 2 --patience 500 --sections critic14 forcing14 # a first cycle takes minutes
training --patience 400 --sections cycles one
training --sections resume hybrid context
[ ${#precisions[@]} = 1 ] || stream "${precisions[1]}"
[ $failed = 0 ] || { echo "something failed or is left; see $out and its logs, and run this again" >&2; exit 1; }
