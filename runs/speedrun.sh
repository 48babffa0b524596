#!/usr/bin/env bash
# From nothing to the shipped models: data, codec, base, AR, causal ODE / CD, DMD, evaluation, export.
#
#   bash runs/speedrun.sh            one GPU (H200: about 29 minutes, 24 with a warm compile cache); writes runs/tiny
#   bash runs/speedrun.sh --smoke    the same path in miniature on a CPU, in minutes: proves the plumbing, nothing else
#
# Stop it at any time and run it again: finished stages are skipped, a running one continues from its checkpoint.
# STAGES="codec data base" runs only these; MORE="trainer.preview_every=0" overrides every recipe.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${RUN:-runs/tiny}
smoke=()
clips=32768 eval_clips=512
if [ "${1:-}" = "--smoke" ]; then
  run=${RUN:-runs/smoke} clips=48 eval_clips=8
  smoke=(smoke)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # networks this small only lose by more
fi
stages=${STAGES:-codec data base ar ode cd dmd eval embed}
reel() { python3 -m causalreel "$@"; }

# train NAME RECIPE [KEY=VALUE ...]: one stage, its paths put below $run
train() {
  local name=$1 recipe=$2
  shift 2
  if [ -f "$run/$name/export/config.yaml" ] || [ -f "$run/$name/export/codec.yaml" ]; then return; fi
  local more=("trainer.out=$run/$name" ${MORE:-})
  if [ "$recipe" != tiny/codec ]; then more+=("data=$run/data" "codec=$run/codec/export"); fi
  if [ ${#smoke[@]} -gt 0 ]; then
    more+=(trainer.steps=3 trainer.device=cpu trainer.preview_every=0 settings.batch=2)
    case $recipe in
      tiny/codec) more+=(rows=8) ;;
      tiny/base) more+=(model=tiny-smoke) ;;
      tiny/causal_ode) more+=(settings.pairs=4 settings.grid=4 "settings.keep=[0,1,2,3]") ;;
      tiny/dmd*) more+=(settings.critic_updates=2 rows=null) ;;
    esac
  fi
  echo "== $name ($(date +%T))"
  reel train "$recipe" "${more[@]}" "$@"
}
from() { # from ROLE=NAME ...: where roles start
  for pair in "$@"; do echo "init.${pair%%=*}=$run/${pair#*=}/export"; done
}

for stage in $stages; do
  case $stage in
    codec) train codec tiny/codec ;;
    data)
      [ -d "$run/data" ] && [ -f "$run/data/done" ] || {
        reel encode --codec "$run/codec/export" --out "$run/data" --clips "$clips"
        touch "$run/data/done"
      } ;;
    base) train base tiny/base ;;
    ar)
      train ar-frame tiny/ar $(from student=base)
      train ar-chunk tiny/ar $(from student=base) settings.chunk=3 ;;
    ode)
      train ode-frame tiny/causal_ode $(from student=ar-frame teacher=ar-frame)
      train ode-chunk tiny/causal_ode $(from student=ar-chunk teacher=ar-chunk) settings.chunk=3 ;;
    cd)
      train cd-frame tiny/causal_cd $(from student=ar-frame teacher=ar-frame)
      train cd-chunk tiny/causal_cd $(from student=ar-chunk teacher=ar-chunk) settings.chunk=3 ;;
    dmd)
      init=${INIT:-ode}
      train "frame-2step" tiny/dmd $(from student=$init-frame critic=base teacher=base)
      train "frame-1step" tiny/dmd_1step $(from student=$init-frame critic=base teacher=base)
      train "chunk-4step" tiny/dmd_chunk $(from student=$init-chunk critic=base teacher=base) ;;
    eval)
      reel eval --clips "$eval_clips" --out "$run/eval" "base=$run/base/export" \
        "AR frame-wise=$run/ar-frame/export" "AR chunk-wise=$run/ar-chunk/export" \
        "frame-2step=$run/frame-2step/export" "frame-1step=$run/frame-1step/export" \
        "chunk-4step=$run/chunk-4step/export" ;;
    embed)
      assets=${EMBED:-$run/assets}
      mkdir -p "$assets"
      cp "$run/codec/export/codec.safetensors" "$run/codec/export/codec.yaml" "$assets/"
      for variant in frame-2step frame-1step chunk-4step; do
        reel export "$run/$variant/export" "$assets/$variant" --name "tiny/$variant" --codec tiny \
          --scores "$run/eval/scores.json" --label "$variant"
      done ;;
    *) echo "unknown stage $stage" >&2; exit 2 ;;
  esac
done
