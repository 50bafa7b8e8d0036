#!/usr/bin/env bash
# GPT-2 small (124M) with rinna's tokenizer, one epoch over Aozora Bunko. A machine that has only the repository is
# enough: what is not there yet is installed, downloaded, prepared and tokenized first.
#
#     nohup ./command.sh > training.log 2>&1 &
#
# Runs from anywhere. Killed or stopped, the same command goes on from the newest checkpoint. The exit code is that of
# pretraining.py: 0 finished, 2 a mistake, 75 stopped by a signal. For a rented machine there are two variables:
#
#     HOURLY_USD=PRICE   the closing line says what this session cost, too
#     STOP_POD=1         a RunPod pod is stopped at the end, after a failure too, but not where a signal ended the run
set -euo pipefail
cd "$(dirname "$0")"
python=../.venv/bin/python
[ -x "$python" ] || python=python3

tokenizer=(--tokenizer hf --hf_name rinna/japanese-gpt2-small)

road() { # each step is done only where its result is not there
  if ! "$python" -c 'import sentencepiece, tiktoken' 2>/dev/null; then # no image that has torch has these
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

set -m # each command gets a process group of its own: a signal to this one reaches it once, from forward
signalled=

# shellcheck disable=SC2329 # the traps call it
forward() { # $1: a signal for the command that runs
  signalled=$1
  kill -"$1" "${!:-}" 2>/dev/null || true
}

run() { # a command, with this script awake for signals; its exit code
  [ -z "$signalled" ] || return 75
  "$@" &
  while kill -0 $! 2>/dev/null; do wait $! || true; done # a signal ends wait, and not the command
  wait $!
}

pod_problem() { # why no pod can be stopped from here, if so
  if [ -z "${RUNPOD_POD_ID:-}" ]; then
    echo "RUNPOD_POD_ID is not set, so this is no RunPod pod"
  elif ! command -v runpodctl >/dev/null; then
    echo "runpodctl is not installed"
  fi
}

stop_pod() { # $1: the exit code
  local problem
  problem=$(pod_problem)
  if [ "$1" -eq 75 ]; then
    problem="a signal ended the run, and the same command goes on"
  fi
  if [ -n "$problem" ]; then
    echo "the pod is not stopped: $problem"
  elif ! runpodctl stop pod "$RUNPOD_POD_ID"; then
    echo "the pod is not stopped: runpodctl failed; stop it by hand"
  fi
}

if [[ ! ${HOURLY_USD:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]] || [[ ! ${STOP_POD:-0} =~ ^[01]$ ]]; then
  echo "error: HOURLY_USD=${HOURLY_USD:-} has to be a number and STOP_POD=${STOP_POD:-} 0 or 1" >&2
  exit 2
fi
if [ "${STOP_POD:-0}" = 1 ] && [ -n "$(pod_problem)" ]; then
  echo "warning: STOP_POD=1 will not stop the pod: $(pod_problem)"
fi
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP # nothing under nohup: what was ignored before, bash leaves so

code=0
road || code=$?
[ -z "$signalled" ] || [ "$code" -eq 0 ] || code=75 # a signal may also come where pretraining.py is not running yet
awk -v seconds="$SECONDS" -v usd="${HOURLY_USD:-}" 'BEGIN {
  printf "this session took %.2f hours", seconds / 3600
  if (usd != "") printf ", %.2f USD at %s USD an hour", seconds / 3600 * usd, usd
  print ""
}'
[ "${STOP_POD:-0}" = 0 ] || stop_pod "$code"
exit "$code"
