#!/usr/bin/env bash
# Drift of the tiny models under every context policy, before and after training for length; tables and pictures.
#
#   bash runs/drift.sh            one GPU (written for an H200, about 6 minutes); writes runs/drift
#   bash runs/drift.sh --smoke    the same path in miniature on a CPU: proves the plumbing only
#
# Run it again to go on where it stopped. OUT names another folder, JOBS how many clips' processes share the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/drift} jobs=${JOBS:-10} clips=4096 small=() more=()
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=${PYTHONPATH:-src}
if [ "${1:-}" = "--smoke" ]; then
  clips=48 small=(--smoke)
  more=(trainer.steps=1 trainer.device=cpu trainer.preview_every=0 settings.batch=2 settings.critic_updates=1)
fi
mkdir -p "$out"

if [ ! -f "$out/data/done" ]; then
  python3 -m causalreel encode --codec tiny --out "$out/data" --clips "$clips"
  touch "$out/data/done"
fi
longer() { # longer NAME RECIPE: a model trained for length
  if [ -f "$out/$1/export/config.yaml" ]; then return 0; fi
  python3 -m causalreel train "$2" "trainer.out=$out/$1" "data=$out/data" ${more[@]+"${more[@]}"} >"$out/$1.log" 2>&1
}
trainings=()
for pair in "long tiny/long" "long-chunk tiny/long_chunk" "rolling tiny/rolling"; do
  longer $pair &
  trainings+=($!)
done
measure() { python3 benchmarks/drift.py --jobs "$jobs" ${small[@]+"${small[@]}"} "$@"; }
measure --out "$out/shipped"
failed=0
for training in "${trainings[@]}"; do wait "$training" || failed=1; done
[ $failed = 0 ] || { echo "a training failed, see $out/*.log" >&2; exit 1; }
measure --out "$out/trained" --ways renew infinity-rope memrope sink rolling-sink \
  --models "frame-2step-long=$out/long/export" "chunk-4step-long=$out/long-chunk/export"
measure --out "$out/trained" --ways rolling-plan \
  --models "chunk-4step-rolling=$out/rolling/export" chunk-4step=tiny/chunk-4step
