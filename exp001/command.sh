#!/usr/bin/env bash
# Train a GPT of 124M parameters with rinna's tokenizer for one epoch on Aozora Bunko. A machine that has only the
# repository is enough: this first installs packages and downloads, prepares and tokenizes the data, where missing.
#
#     nohup ./command.sh > training.log 2>&1 &
#
# It runs from any folder. After a kill or a stop, run the same command to resume from the newest checkpoint. The exit
# code is that of pretraining.py: 0 finished, 2 a mistake, 75 stopped by a signal. Two variables serve rented machines:
#
#     HOURLY_USD=PRICE   also print at the end what this session cost
#     STOP_POD=1         stop this RunPod pod at the end, also after a failure, but not where a signal ended the run
set -euo pipefail
trap '' PIPE # a tee that was killed must not end this script before the pod is stopped
cd "$(dirname "$0")"
python=../.venv/bin/python
[ -x "$python" ] || python=python3

tokenizer=(--tokenizer hf --hf_name rinna/japanese-gpt2-small)

train() { # run each step whose result does not exist yet
  if ! "$python" -c 'import sentencepiece, tiktoken' 2>/dev/null; then # images that bring torch lack these
    run "$python" -m pip install --quiet -r ../requirements.txt || return
  fi
  if [ ! -e ../dataset/001_pretok/manifest.json ]; then
    if [ ! -e ../dataset/001/manifest.json ]; then
      run "$python" ../dataset/download_aozora.py || return
      run "$python" ../dataset/prepare_aozora_jsonl.py \
        --jsonl_path ../dataset/aozorabunko-dedupe-clean.jsonl --output_dir ../dataset/001 || return
    fi
    run "$python" ../pretokenize.py "${tokenizer[@]}" \
      --data_dir ../dataset/001 --output_dir ../dataset/001_pretok || return
  fi
  run "$python" ../pretraining.py "${tokenizer[@]}" \
    --data_dir ../dataset/001 --use_pretokenized --pretokenized_dir ../dataset/001_pretok \
    --n_epochs 1 --batch_size 16 --eval_freq 100 --print_sample_iter 100 \
    --output_dir model_checkpoints
}

say() { # print a line; where nobody reads it any more, continue
  printf '%s\n' "$*" 2>/dev/null || true
}

set -m # each command gets its own process group, so that a signal to this one reaches it just once, through forward
signalled=

# shellcheck disable=SC2329 # the traps call it
forward() { # pass the signal $1 to the running command
  signalled=$1
  kill -"$1" "${!:-}" 2>/dev/null || true
}

run() { # run a command while this script handles signals; return the command's exit code
  [ -z "$signalled" ] || return 75
  "$@" &
  while kill -0 $! 2>/dev/null; do wait $! || true; done # a signal ends wait but not the command
  wait $!
}

is_training() { # whether a process holds the lock of model_checkpoints
  PYTHONPATH=.. "$python" -c 'import pathlib, sys
from gptkit.base.locks import lock_holder
sys.exit(lock_holder(pathlib.Path("model_checkpoints/.lock")) is None)' 2>/dev/null
}

pod_problem() { # print why the pod cannot be stopped from here, or nothing
  if [ -z "${RUNPOD_POD_ID:-}" ]; then
    echo "RUNPOD_POD_ID is not set, so this is not a RunPod pod"
  elif ! command -v runpodctl >/dev/null; then
    echo "runpodctl is not installed"
  elif is_training; then # another command.sh, or a pretraining.py started by hand: this one was refused
    echo "another run is training in model_checkpoints"
  fi
}

stop_pod() { # stop the pod, unless the exit code $1 shows that a signal ended the run
  local problem
  problem=$(pod_problem)
  if [ "$1" -eq 75 ]; then
    problem="a signal ended the run; run the same command to resume"
  fi
  if [ -n "$problem" ]; then
    say "the pod is not stopped: $problem"
  elif ! runpodctl stop pod "$RUNPOD_POD_ID"; then
    say "the pod is not stopped: runpodctl failed; stop it by hand"
  fi
}

if [[ ! ${HOURLY_USD:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]] || [[ ! ${STOP_POD:-0} =~ ^[01]$ ]]; then
  echo "error: HOURLY_USD=${HOURLY_USD:-} has to be a number and STOP_POD=${STOP_POD:-} 0 or 1" >&2
  exit 2
fi
if [ "${STOP_POD:-0}" = 1 ] && [ -n "$(pod_problem)" ]; then
  say "warning: STOP_POD=1 will not stop the pod: $(pod_problem)"
fi
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP # no effect under nohup: bash keeps ignoring a signal that was ignored when it started

code=0
train || code=$?
[ -z "$signalled" ] || [ "$code" -eq 0 ] || code=75 # a signal may also arrive before pretraining.py runs
say "$(awk -v seconds="$SECONDS" -v usd="${HOURLY_USD:-}" 'BEGIN {
  printf "this session took %.2f hours", seconds / 3600
  if (usd != "") printf ", %.2f USD at %s USD an hour", seconds / 3600 * usd, usd
}')"
[ "${STOP_POD:-0}" = 0 ] || stop_pod "$code"
exit "$code"
