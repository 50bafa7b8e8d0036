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
# shellcheck source=cloud/machine.sh
source ../cloud/machine.sh # say, run, prepare_python and its $python, stop_pod

tokenizer=(--tokenizer hf --hf_name rinna/japanese-gpt2-small)
settings=(--n_epochs 1 --batch_size 16 --eval_freq 100 --print_sample_iter 100)

train() { # run each step whose result does not exist yet
  prepare_python ${settings[@]+"${settings[@]}"} || return # a torch that is there is kept, and checked against the GPU first
  if [ ! -e ../dataset/001_pretok/manifest.json ]; then
    if [ ! -e ../dataset/001/manifest.json ]; then
      run "$python" ../dataset/download_aozora.py || return
      run "$python" ../dataset/prepare_aozora_jsonl.py \
        --jsonl_path ../dataset/aozorabunko-dedupe-clean.jsonl --output_dir ../dataset/001 || return
    fi
    run "$python" ../pretokenize.py "${tokenizer[@]}" \
      --data_dir ../dataset/001 --output_dir ../dataset/001_pretok || return
  fi
  run "$python" ../pretraining.py "${tokenizer[@]}" ${settings[@]+"${settings[@]}"} \
    --data_dir ../dataset/001 --use_pretokenized --pretokenized_dir ../dataset/001_pretok \
    --output_dir model_checkpoints
}

if [[ ! ${HOURLY_USD:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]] || [[ ! ${STOP_POD:-0} =~ ^[01]$ ]]; then
  echo "error: HOURLY_USD=${HOURLY_USD:-} has to be a number and STOP_POD=${STOP_POD:-} 0 or 1" >&2
  exit 2
fi
if [ "${STOP_POD:-0}" = 1 ] && [ -n "$(pod_problem)" ]; then
  say "warning: STOP_POD=1 will not stop the pod: $(pod_problem)"
fi
pass_on_signals

code=0
train || code=$?
[ -z "$signalled" ] || [ "$code" -eq 0 ] || code=75 # a signal may also arrive before pretraining.py runs
say "$(awk -v seconds="$SECONDS" -v usd="${HOURLY_USD:-}" 'BEGIN {
  printf "this session took %.2f hours", seconds / 3600
  if (usd != "") printf ", %.2f USD at %s USD an hour", seconds / 3600 * usd, usd
}')"
[ "${STOP_POD:-0}" = 0 ] || stop_pod "$code"
exit "$code"
