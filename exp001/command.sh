#!/usr/bin/env bash
# exp001: GPT-2 small (124M) with rinna's tokenizer, one epoch over Aozora Bunko.
#
#     nohup ./command.sh > training.log 2>&1 &
#
# Runs from anywhere. Killed or stopped, the same command goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")"
python=../.venv/bin/python
[ -x "$python" ] || python=python3

exec "$python" ../pretraining.py \
  --tokenizer hf --hf_name rinna/japanese-gpt2-small \
  --data_dir ../dataset/001 --use_pretokenized --pretokenized_dir ../dataset/001_pretok \
  --n_epochs 1 --batch_size 16 --eval_freq 100 --print_sample_iter 100 \
  --output_dir model_checkpoints
