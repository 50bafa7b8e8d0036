#!/usr/bin/env bash
# Run everything that waits for a GPU, in at most nine minutes. Without a GPU it runs on the CPU.
#
#     benchmarks/gpu_suite.sh
#     DATA_DIR=dataset/001_pretok TEXT_PATH=heldout.jsonl.xz NANOGPT_DIR=../nanoGPT benchmarks/gpu_suite.sh
#     TINY=1 OUT=/tmp/out benchmarks/gpu_suite.sh      all sizes tiny, on any machine in less than a minute
#     PARTS=aozora JSONL_PATH=SUBSET HELDOUT=HELDOUT BEFORE_DIR=CHECKOUT benchmarks/gpu_suite.sh
#
# Each part writes its result to OUT, and its output to OUT/PART.txt:
#   check       gpu_check.json: bfloat16, float16, compiled, fused, the loss in chunks, Muon, GaLore, resuming bit for bit
#   speed       train_speed_32000.json: tokens/s and MFU at 124M, context 1,024, against the peers
#   quality     quality_metrics.jsonl: the default recipe at 124M for four minutes
#   evaluation  evaluation.json: that model on the text of TEXT_PATH, if that is given
#   parallel    parallel_check.json: FSDP2 (and with several GPUs DDP) on all GPUs gives the losses of one process
#
# PARTS=aozora runs these instead, which have a limit of their own, 13 minutes each:
#   aozora_ours    aozora_50M.json: benchmarks/aozora.py, the list of 50 million characters for 8 minutes (AOZORA_MINUTES)
#   aozora_before  the same of an earlier checkout of this project, in BEFORE_DIR, if that is given
#
# A part that ends leaves OUT/PART.done, and is skipped from then on, on the same kind of device. A part that ran out of
# time or failed begins again when this is run again; quality resumes from its last checkpoint, and what was compiled is
# still cached.
# Exit code 0: all parts are done, and each check of the first and the last is true.
set -euo pipefail

absolute() { # $1: a path, or nothing; a relative one begins where the caller is
  case $1 in "" | /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}
DATA_DIR=$(absolute "${DATA_DIR:-}")             # token shards (default: the sample corpus, tokenized here)
TOKENIZER_PATH=$(absolute "${TOKENIZER_PATH:-}") # the SentencePiece tokenizer that made them (default: the sample's)
TEXT_PATH=$(absolute "${TEXT_PATH:-}")           # documents to evaluate on
NANOGPT_DIR=$(absolute "${NANOGPT_DIR:-}")       # a checkout of nanoGPT, to time it too
JSONL_PATH=$(absolute "${JSONL_PATH:-}")         # for aozora: the JSONL of the subset of Aozora Bunko
HELDOUT=$(absolute "${HELDOUT:-}")               # for aozora: that of the held-out works
BEFORE_DIR=$(absolute "${BEFORE_DIR:-}")         # for aozora: an earlier checkout of this project
OUT=$(absolute "${OUT:-}")                       # results (default: benchmarks/results/gpu)
WORK_DIR=$(absolute "${WORK_DIR:-}")             # checkpoints and tokens, gigabytes (default: OUT/work)
TINY=${TINY:-}
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/benchmarks/results/gpu}
WORK_DIR=${WORK_DIR:-$OUT/work}
TOKENIZER_PATH=${TOKENIZER_PATH:-$PWD/dataset/sample/tokenizer}

python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
command -v timeout >/dev/null || {
  echo "error: timeout is not installed; install GNU coreutils" >&2
  exit 2
}
device=$("$python" -c 'import sys, torch
from gptkit.base.drivers import gpu_problem, is_cuda_available
problem = gpu_problem()
if problem:
    print("error:", problem, file=sys.stderr)
    sys.exit(3)
print("cuda" if is_cuda_available() else "cpu")') || {
  [ $? -eq 3 ] || echo "error: $python has no working torch; install requirements.txt, or name another one in PYTHON" >&2
  exit 2
}
kind=$device${TINY:+_tiny}
mkdir -p "$OUT" "$WORK_DIR"
[ -e "$WORK_DIR/.gitignore" ] || echo '*' >"$WORK_DIR/.gitignore"
export RESULTS_DIR=$OUT # where benchmarks/machine.py writes

readonly LIMIT_S=530                               # of nine minutes; the rest is for ending a part
readonly SPEED_S=150 QUALITY_S=250 EVALUATION_S=25 # kept for a part while the ones before it run
unfinished=()

is_done() { # $1: a part
  [ "$(cat "$OUT/$1.done" 2>/dev/null)" = "$kind" ]
}

part() { # $1: its name, $2: seconds kept for the parts after it, then its command
  local name=$1 left_s=$((LIMIT_S - SECONDS - $2))
  shift 2
  limited_part "$name" "$left_s" "$@"
}

limited_part() { # $1: its name, $2: seconds that it may take, then its command
  local name=$1 left_s=$2
  shift 2
  if is_done "$name"; then
    echo "== $name: done before, skipped"
  elif [ "$left_s" -lt 10 ]; then
    echo "== $name: no time left"
    unfinished+=("$name")
  else
    echo "== $name: on $device, at most $left_s s"
    if timeout --kill-after=5 "$left_s" "$@" 2>&1 | tee "$OUT/$name.txt"; then
      echo "$kind" >"$OUT/$name.done"
    else
      echo "== $name: failed, or out of time"
      unfinished+=("$name")
    fi
  fi
}

finish() { # end with an error where a part is unfinished
  [ ${#unfinished[@]} -gt 0 ] || return 0
  echo "== not finished: ${unfinished[*]}; run the same command again" >&2
  exit 1
}

if [ "${PARTS:-}" = aozora ]; then
  minutes=${AOZORA_MINUTES:-8}
  aozora=(--track 50M --jsonl_path "$JSONL_PATH" --heldout_path "$HELDOUT" --minutes "$minutes")
  if [ -n "$TINY" ]; then
    head -n 2 dataset/sample/sample.jsonl >"$WORK_DIR/heldout.jsonl"
    aozora=(--track sample --jsonl_path dataset/sample/sample.jsonl --heldout_path "$WORK_DIR/heldout.jsonl" --vocab_size 500)
  elif [ "$device" = cpu ] || [ -z "$JSONL_PATH" ] || [ -z "$HELDOUT" ]; then
    echo "== aozora: skipped; it needs a GPU, and the paths JSONL_PATH and HELDOUT"
    exit 0
  fi
  aozora+=(--work_dir "$WORK_DIR/aozora" --device "$device")
  limit_s=$((60 * minutes + 300)) # tokens, a plan and scores take the rest
  limited_part aozora_ours "$limit_s" "$python" benchmarks/aozora.py "${aozora[@]}" --contenders ours
  [ -z "$BEFORE_DIR" ] || limited_part aozora_before "$limit_s" \
    "$python" benchmarks/aozora.py "${aozora[@]}" --contenders before --before_dir "$BEFORE_DIR"
  finish
  echo "== all parts are done; the results are in $OUT"
  exit 0
fi

check=(--device "$device")
parallel=(--device "$device")
speed=(--device "$device" --size 12x768 --context_length 1024 --batch_size 16 --vocab_size 32000)
quality=(--device "$device" --model_size 124M --budget_minutes 4)
if [ -n "$TINY" ]; then
  check+=(--tiny)
  parallel+=(--tiny)
  speed=(--device "$device" --size 1x32 --n_heads 2 --context_length 16 --batch_size 2 --vocab_size 500 --n_rounds 2)
  quality+=(--n_layers 1 --emb_dim 32 --n_heads 2 --context_length 32 --max_steps 5 --bigram_steps 2 --eval_iter 1)
fi
[ "$device" = cpu ] || speed+=(--compile)
[ -z "$NANOGPT_DIR" ] || speed+=(--nanogpt_dir "$NANOGPT_DIR")

quality+=(--tokenizer sentencepiece --tokenizer_path "$TOKENIZER_PATH" --use_pretokenized)
if [ -n "$DATA_DIR" ]; then
  quality+=(--data_dir "$DATA_DIR/text_is_not_needed" --pretokenized_dir "$DATA_DIR")
else
  [ -e "$WORK_DIR/001/manifest.json" ] || "$python" dataset/prepare_aozora_jsonl.py \
    --jsonl_path dataset/sample/sample.jsonl --output_dir "$WORK_DIR/001"
  quality+=(--data_dir "$WORK_DIR/001" --batch_size 8 --grad_accum_steps 1) # a budget's own batch is larger than that corpus
fi

part check $((SPEED_S + QUALITY_S + EVALUATION_S)) "$python" benchmarks/checks/gpu_check.py "${check[@]}"
part speed $((QUALITY_S + EVALUATION_S)) "$python" benchmarks/train_speed.py "${speed[@]}"
part quality $EVALUATION_S "$python" pretraining.py "${quality[@]}" --output_dir "$WORK_DIR/quality_$kind"
if is_done quality; then
  cp -p "$WORK_DIR/quality_$kind/metrics.jsonl" "$OUT/quality_metrics.jsonl"
  # Its standard output is the result; its standard error is handled like every part's.
  # shellcheck disable=SC2016 # the inner shell expands it
  [ -z "$TEXT_PATH" ] || part evaluation 0 bash -c '"$@" >"$RESULTS_DIR/evaluation.json"' evaluation \
    "$python" evaluate_model.py --exp_dir "$WORK_DIR/quality_$kind" --text_path "$TEXT_PATH" --device "$device"
fi

part parallel 0 "$python" benchmarks/checks/parallel_check.py "${parallel[@]}"

finish
if grep '": false' "$OUT/gpu_check.json" "$OUT/parallel_check.json" >&2; then
  echo "== these checks failed; these files have the figures" >&2
  exit 1
fi
echo "== all parts are done; the results are in $OUT"
