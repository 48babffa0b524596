#!/usr/bin/env bash
# Drift of the tiny models under every context policy, before and after training for length; tables and pictures.
#
#   bash runs/drift.sh            one GPU (written for an H200, about 7 minutes); writes runs/drift
#   GPUS="0 1" bash runs/drift.sh models for length are trained and measured on the last, the others on the first
#   bash runs/drift.sh --smoke    the same path in miniature on a CPU: proves the plumbing only; writes runs/drift-smoke
#
# Run it again to go on where it stopped. OUT names another folder, JOBS how many processes share a GPU. BUDGET: seconds
# for all of it: trainings that take too long are stopped and measured as they are, clips end as long as they are when the
# time is up, and the tables hold what there is.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/drift} jobs=${JOBS:-6} budget=${BUDGET:-0} clips=4096 small=() more=(trainer.preview_every=0)
read -r -a gpus <<<"${GPUS:-}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=${PYTHONPATH:-src}
if [ "${1:-}" = "--smoke" ]; then
  out=${OUT:-runs/drift-smoke} clips=48 small=(--smoke)
  more+=(trainer.steps=1 trainer.device=cpu settings.batch=2 settings.critic_updates=1)
fi
mkdir -p "$out"

on() { # on NUMBER: use that one of the GPUs that were given
  [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[$1]}
}
left() { # left PER_CENT: seconds until so much of the budget is spent, at least 1; 0: there is none
  local seconds=$((budget * $1 / 100 - SECONDS))
  if [ "$budget" = 0 ]; then echo 0; else echo $((seconds > 1 ? seconds : 1)); fi
}
longer() { # longer PER_CENT NAME RECIPE: a model trained for length, as far as it comes
  local train=(python3 -m causalreel train "$3" "trainer.out=$out/$2" "data=$out/data" ${more[@]+"${more[@]}"})
  if [ -f "$out/$2/export/config.yaml" ] && [ ! -f "$out/$2.part" ]; then return 0; fi
  if timeout -k 30 "$(left "$1")" "${train[@]}" >"$out/$2.log" 2>&1; then
    rm -f "$out/$2.part"
    return 0
  fi
  echo "training $2 is not over, see $out/$2.log" >&2
  touch "$out/$2.part"
  if compgen -G "$out/$2/checkpoints/step-*" >/dev/null; then # asked for no more steps, it writes what there is
    "${train[@]}" trainer.steps=1 >>"$out/$2.log" 2>&1
  fi
  return 1
}
train() { # train PER_CENT: all three, and their clips
  local failed=0 first
  if [ ! -f "$out/data/done" ]; then
    python3 -m causalreel encode --codec tiny --out "$out/data" --clips "$clips" >"$out/data.log" 2>&1 || return 1
    touch "$out/data/done"
  fi
  longer "$1" long tiny/long &
  first=$!
  longer "$1" long-chunk tiny/long_chunk || failed=1
  wait "$first" || failed=1
  longer $(($1 + 12)) rolling tiny/rolling || failed=1
  return $failed
}
measure() { # measure PER_CENT ARGUMENTS ...
  python3 benchmarks/drift.py --jobs "$jobs" --budget "$(left "$1")" ${small[@]+"${small[@]}"} "${@:2}"
}
spelled() { # spelled LABEL NAME: the model, if it is there; one that is half trained says so
  if [ -f "$out/$2/export/config.yaml" ]; then
    if [ -f "$out/$2.part" ]; then echo "$1-part=$out/$2/export"; else echo "$1=$out/$2/export"; fi
  fi
}
trained() { # the models trained for length, as far as they are there
  local failed=0 models
  mapfile -t models < <(spelled frame-2step-long long && spelled chunk-4step-long long-chunk)
  [ ${#models[@]} = 0 ] || measure 94 --out "$out/trained" --models "${models[@]}" || failed=1
  mapfile -t models < <(spelled chunk-4step-rolling rolling && echo chunk-4step=tiny/chunk-4step)
  measure 97 --out "$out/trained" --ways rolling-plan --models "${models[@]}" || failed=1
  return $failed
}

failed=0
if [ ${#gpus[@]} -gt 1 ]; then
  (on -1 && { train 45 || failed=1; trained || failed=1; exit $failed; }) &
  aside=$!
  (on 0 && measure 95 --out "$out/shipped") || failed=1
  wait "$aside" || failed=1
else
  on 0
  train 58 &
  aside=$!
  measure 62 --out "$out/shipped" || failed=1
  wait "$aside" || failed=1
  trained || failed=1
fi
[ $failed = 0 ] || { echo "not everything was made; see $out and its logs, and run this again" >&2; exit 1; }
