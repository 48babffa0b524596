#!/usr/bin/env bash
# From nothing to models like those that are shipped: data, codec, base, AR, causal ODE / CD, DMD, evaluation, export.
#
#   bash runs/speedrun.sh               one GPU (H200: 31 minutes before clips had events)
#   FROM=package bash runs/speedrun.sh  codec and base go on from the package's (115 and 320 s there)
#   GPUS="1 2" bash runs/speedrun.sh    frame-wise trainings on the first, chunk-wise ones on the last
#   bash runs/speedrun.sh --smoke       the same path in miniature on a CPU, in a minute or two: proves the plumbing only
#
# From the base model on, frame-wise and chunk-wise trainings go side by side; names mark their lines. Trainings of
# stage 3 are bound by the host that launches their kernels, so on a GPU they follow each other. Stop it at any time and
# run it again: finished stages are skipped, running ones continue from their checkpoints. STAGES="codec data base" runs
# only these; MORE="trainer.preview_every=0" overrides every recipe. EVENTS is the share of clips whose caption changes;
# CLIPS how many there are (8192 will do where only stages 2 and 3 are left).
# Nothing goes on behind a codec below LEAST_PSNR (32 dB; 0 takes any).
set -euo pipefail
cd "$(dirname "$0")/.."
run=${RUN:-runs/tiny}
smoke=() least=(--least-psnr "${LEAST_PSNR:-32}") # of a codec, before all else depends on it
clips=${CLIPS:-32768} eval_clips=512
if [ "${1:-}" = "--smoke" ]; then
  run=${RUN:-runs/smoke} clips=48 eval_clips=8
  smoke=(smoke) least=()
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # networks this small only lose by more
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} # up to four trainings at once, each else with a thread for every core
stages=${STAGES:-codec data base ar ode cd dmd eval embed} init=${INIT:-ode} events=${EVENTS:-0.75}
read -r -a gpus <<<"${GPUS:-}"
again_codec=() again_base=()
case ${FROM:-nothing} in
  nothing) ;;
  package)
    again_codec=(init.codec=tiny trainer.steps=2000 settings.sharpen_from=0 trainer.optimisers.codec.lr=6e-4)
    again_base=(init.student=tiny/base trainer.steps=10000 trainer.optimisers.student.lr=5e-4) ;;
  *) echo "FROM must be nothing or package, got $FROM" >&2; exit 2 ;;
esac
for stage in $stages; do
  [[ " codec data base ar ode cd dmd eval embed " == *" $stage "* ]] || { echo "unknown stage $stage" >&2; exit 2; }
done
on() { # on NUMBER: use that one of the GPUs that were given
  [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[$1]}
}
wanted() { [[ " $stages " == *" $1 "* ]]; }
reel() { python3 -m causalreel "$@"; }

# train NAME STAGE RECIPE [KEY=VALUE ...]: one training if its stage is wanted, its paths put below $run
train() {
  local name=$1 stage=$2 recipe=$3
  shift 3
  wanted "$stage" || return 0
  if [ -f "$run/$name/export/config.yaml" ] || [ -f "$run/$name/export/codec.yaml" ]; then return 0; fi
  local more=("trainer.out=$run/$name" ${MORE:-})
  if [ "$recipe" != tiny/codec ]; then more+=("data=$run/data" "codec=$run/codec/export"); fi
  if [ ${#smoke[@]} -gt 0 ]; then
    more+=(trainer.steps=3 trainer.device=cpu trainer.preview_every=0 settings.batch=2)
    case $recipe in
      tiny/codec) more+=(rows=8 settings.frames=9) ;;
      tiny/base) more+=(model=tiny-smoke) ;;
      tiny/causal_ode) more+=(settings.pairs=4 settings.grid=4 "settings.keep=[0,1,2,3]") ;;
      tiny/dmd*) more+=(settings.critic_updates=2 rows=null) ;;
    esac
  fi
  echo "== $name ($(date +%T))"
  if [ -t 0 ]; then # alone on a terminal: a bar
    reel train "$recipe" "$@" "${more[@]}"
  else # beside others, or into a log: lines
    reel train "$recipe" "$@" "${more[@]}" 2>&1 | (trap '' INT TERM && exec sed -u "s/^/[$name] /")
  fi
  echo "== $name done ($(date +%T))"
}
from() { # from ROLE=NAME ...: where roles start
  for pair in "$@"; do echo "init.${pair%%=*}=$run/${pair#*=}/export"; done
}

aside() { # aside COMMAND ...: in the background, in $!; told to stop, it ends when its trainings have saved
  (
    trap 'trap "" TERM; wait; exit 143' TERM
    "$@"
  ) </dev/null &
}
together() { # together 'COMMAND ...' ...: all at once, until all have ended
  local command pids=() failed=0
  for command in "$@"; do aside $command; pids+=($!); done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}
frame_wise() {
  on 0
  train ar-frame ar tiny/ar $(from student=base)
  together "train ode-frame ode tiny/causal_ode $(from student=ar-frame teacher=ar-frame)" \
    "train cd-frame cd tiny/causal_cd $(from student=ar-frame teacher=ar-frame)"
  train frame-2step dmd tiny/dmd $(from student=$init-frame critic=base teacher=base)
  train frame-1step dmd tiny/dmd_1step $(from student=$init-frame critic=base teacher=base)
}
chunk_wise() {
  on -1
  train ar-chunk ar tiny/ar $(from student=base) settings.chunk=3
  together "train ode-chunk ode tiny/causal_ode $(from student=ar-chunk teacher=ar-chunk) settings.chunk=3" \
    "train cd-chunk cd tiny/causal_cd $(from student=ar-chunk teacher=ar-chunk) settings.chunk=3"
  train chunk-4step dmd tiny/dmd_chunk $(from student=$init-chunk critic=base teacher=base)
}

on 0
train codec codec tiny/codec "${again_codec[@]}"
if wanted data && [ ! -f "$run/data/done" ]; then
  echo "== data ($(date +%T))"
  reel encode --codec "$run/codec/export" --out "$run/data" --clips "$clips" --events "$events" \
    "${least[@]}"
  touch "$run/data/done"
fi
train base base tiny/base "${again_base[@]}"

set -m # a process group for each, so that one signal reaches each training once
lanes=()
for lane in frame_wise chunk_wise; do aside $lane; lanes+=($!); done
set +m
stop() {
  trap '' INT TERM HUP
  for lane in "${lanes[@]}"; do kill -TERM -- "-$lane" || true; done
  wait
  exit 130
}
trap stop INT TERM HUP
failed=0
for lane in "${lanes[@]}"; do wait "$lane" || failed=1; done
trap - INT TERM HUP
[ $failed = 0 ] || { echo "a training failed" >&2; exit 1; }

if wanted eval; then
  echo "== eval ($(date +%T))"
  reel eval --clips "$eval_clips" --out "$run/eval" "base=$run/base/export" \
    "AR frame-wise=$run/ar-frame/export" "AR chunk-wise=$run/ar-chunk/export" \
    "frame-2step=$run/frame-2step/export" "frame-1step=$run/frame-1step/export" \
    "chunk-4step=$run/chunk-4step/export"
fi
if wanted embed; then
  assets=${EMBED:-$run/assets}
  mkdir -p "$assets"
  cp "$run/codec/export/codec.safetensors" "$run/codec/export/codec.yaml" "$assets/"
  embed() { # embed NAME LABEL: a model with its scores, as the package ships it
    reel export "$run/$1/export" "$assets/$1" --name "tiny/$1" --codec tiny --scores "$run/eval/scores.json" --label "$2"
  }
  embed base base
  embed ar-frame "AR frame-wise"
  embed ar-chunk "AR chunk-wise"
  for variant in frame-2step frame-1step chunk-4step; do embed "$variant" "$variant"; done
fi
echo "== end ($(date +%T))"
