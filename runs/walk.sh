#!/usr/bin/env bash
# From nothing to a world that one walks in: codec, data, base, AR, CD, DMD with 2 and with 1 step, measures, pictures.
#
#   bash runs/walk.sh            one GPU (H200: about 20 minutes, estimated); writes runs/walk
#   bash runs/walk.sh --smoke    the same path in miniature on a CPU, in a minute: proves the plumbing only
#
# The last trainings share the GPU: their hosts are slower than it. Stop it at any time and run it again: finished
# stages are skipped, running ones continue from their checkpoints. STAGES="codec data base" runs only these;
# MORE="trainer.log_every=10" overrides every recipe; BASE_STEPS, AR_STEPS, DMD_STEPS shorten theirs.
# Nothing goes on behind a codec below LEAST_PSNR (32 dB; 0 takes any).
set -euo pipefail
cd "$(dirname "$0")/.."
run=${RUN:-runs/walk}
clips=24576 eval_clips=256 smoke="" least=(--least-psnr "${LEAST_PSNR:-32}") # of the codec, before all else depends on it
if [ "${1:-}" = "--smoke" ]; then
  run=${RUN:-runs/walk-smoke} clips=8 eval_clips=2 smoke=1 least=()
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # networks this small only lose by more
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
all="codec data base ar cd dmd eval"
stages=${STAGES:-$all}
for stage in $stages; do
  [[ " $all " == *" $stage "* ]] || { echo "unknown stage $stage" >&2; exit 2; }
done
wanted() { [[ " $stages " == *" $1 "* ]]; }
reel() { python3 -m causalreel "$@"; }

# train NAME STAGE [ROLE=NAME ...]: recipe tiny/walk_NAME if its stage is wanted, its paths put below $run
train() {
  local name=$1 stage=$2 pair
  shift 2
  wanted "$stage" || return 0
  if [ -f "$run/$name/export/config.yaml" ] || [ -f "$run/$name/export/codec.yaml" ]; then return 0; fi
  local more=("trainer.out=$run/$name")
  if [ "$name" != codec ]; then more+=("data=$run/data" "codec=$run/codec/export"); fi
  for pair in "$@"; do more+=("init.${pair%%=*}=$run/${pair#*=}/export"); done
  case $name in # a shorter run, where time is short
    base) more+=(${BASE_STEPS:+trainer.steps=$BASE_STEPS}) ;;
    ar) more+=(${AR_STEPS:+trainer.steps=$AR_STEPS}) ;;
    2step | 1step | direct) more+=(${DMD_STEPS:+trainer.steps=$DMD_STEPS}) ;;
  esac
  if [ -n "$smoke" ]; then
    more+=(trainer.steps=2 trainer.device=cpu trainer.preview_every=0 settings.batch=2)
    case $name in
      codec) more+=(rows=4) ;;
      base) more+=(model=walk-smoke) ;;
      2step | 1step | direct) more+=(settings.critic_updates=2) ;;
    esac
  fi
  echo "== $name ($(date +%T))"
  reel train "tiny/walk_$name" "${more[@]}" ${MORE:-} 2>&1 | (trap '' INT TERM && exec sed -u "s/^/[$name] /")
  echo "== $name done ($(date +%T))"
}

train codec codec
if wanted data && [ ! -f "$run/data/done" ]; then
  echo "== data ($(date +%T))"
  reel encode --world walk --codec "$run/codec/export" --out "$run/data" --clips "$clips" "${least[@]}"
  touch "$run/data/done"
fi
train base base
train ar ar student=base
train cd cd student=ar teacher=ar

set -m # a process group for each, so that one signal reaches each training once
lanes=()
lane() {
  train "$@" </dev/null &
  lanes+=($!)
}
lane 2step dmd student=cd critic=base teacher=base
lane 1step dmd student=cd critic=base teacher=base
lane direct dmd student=ar critic=base teacher=base
set +m
stop() {
  trap '' INT TERM HUP
  for pid in "${lanes[@]}"; do kill -TERM -- "-$pid" || true; done
  wait
  exit 130
}
trap stop INT TERM HUP
failed=0
for pid in "${lanes[@]}"; do wait "$pid" || failed=1; done
trap - INT TERM HUP
[ $failed = 0 ] || { echo "a training failed" >&2; exit 1; }

if wanted eval; then
  echo "== eval ($(date +%T))"
  models=("base=$run/base/export" "AR=$run/ar/export" "AR-2step=$run/ar/export@2" "CD-4step=$run/cd/export@4"
    "CD-2step=$run/cd/export@2" "DMD-4step=$run/2step/export@4" "DMD-2step=$run/2step/export"
    "DMD-1step=$run/1step/export" "DMD-2step-from-AR=$run/direct/export")
  if [ -n "$smoke" ]; then models=("base=$run/base/export" "DMD-1step=$run/1step/export"); fi
  reel eval --control --clips "$eval_clips" --out "$run/eval" ${smoke:+--steps 2} "${models[@]}"
fi
echo "== end ($(date +%T))"
