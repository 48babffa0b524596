#!/usr/bin/env bash
# From nothing to a world that one walks in: codec, data, base, AR, CD, DMD with 2 and with 1 step, measures, pictures,
# and the models as the package ships them.
#
#   bash runs/walk.sh            one GPU (an H200 that another training shared: 33 minutes); writes runs/walk
#   bash runs/walk.sh --smoke    the same path in miniature on a CPU, in a minute: proves the plumbing only
#
# The last trainings share the GPU: their hosts are slower than it. Stop it at any time and run it again: finished
# stages are skipped, running ones continue from their checkpoints. STAGES="codec data base" runs only these;
# MORE="trainer.log_every=10" overrides every recipe; BASE_STEPS, AR_STEPS, DMD_STEPS shorten theirs.
# Nothing goes on behind a codec below LEAST_PSNR (32 dB; 0 takes any). What stage 3 has not made is not evaluated, and the
# causal CD model is in its place among the shipped ones. EMBED is where these go ($RUN/assets).
set -euo pipefail
cd "$(dirname "$0")/.."
run=${RUN:-runs/walk}
clips=24576 eval_clips=256 smoke="" least=(--least-psnr "${LEAST_PSNR:-32}") # of the codec, before all else depends on it
if [ "${1:-}" = "--smoke" ]; then
  run=${RUN:-runs/walk-smoke} clips=8 eval_clips=2 smoke=1 least=()
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # networks this small only lose by more
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
all="codec data base ar cd dmd eval embed"
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

there() { [ -f "$run/$1/export/config.yaml" ]; }
if wanted eval; then
  echo "== eval ($(date +%T))"
  models=()
  add() { if there "$2"; then models+=("$1=$run/$2/export${3:-}"); fi; } # add LABEL NAME [@STEPS]
  add base base
  add AR ar
  add AR-2step ar @2
  for steps in 4 2 1; do add "CD-${steps}step" cd "@$steps"; done
  add DMD-4step 2step @4
  add DMD-2step 2step
  add DMD-1step 1step
  add DMD-2step-from-AR direct
  add DMD-1step-from-AR direct @1
  if [ -n "$smoke" ]; then
    models=()
    add base base
    add DMD-2step-from-AR direct
    add DMD-1step-from-AR direct @1
  fi
  reel eval --control --clips "$eval_clips" --out "$run/eval" ${smoke:+--steps 2} "${models[@]}"
fi
if wanted embed; then
  assets=${EMBED:-$run/assets}
  embed() { # embed NAME FROM LABEL [OPTION ...]: a model with its scores, as the package ships it
    local name=$1 from=$2 label=$3
    shift 3
    reel export "$run/$from/export" "$assets/$name" --name "tiny/$name" --scores "$run/eval/control.json" \
      --label "$label" "$@"
    sed -i.bak "s|$run/|runs/walk/|" "$assets/$name"/*.yaml && rm -f "$assets/$name"/*.bak
  }
  mkdir -p "$assets/walk"
  cp "$run/codec/export/codec.safetensors" "$run/codec/export/codec.yaml" "$assets/walk/"
  if there direct; then # of stage 3 what measures best, in two steps and in one: docs/walk.md
    embed walk direct DMD-2step-from-AR --codec codec.safetensors
    embed walk-1step direct DMD-1step-from-AR --codec ../walk/codec.safetensors --steps 1 --weights-of walk
  else
    embed walk cd CD-2step --codec codec.safetensors --steps 2
    embed walk-1step cd CD-1step --codec ../walk/codec.safetensors --steps 1 --weights-of walk
  fi
fi
echo "== end ($(date +%T))"
