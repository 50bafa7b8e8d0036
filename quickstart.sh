#!/usr/bin/env bash
# Take a fresh machine to generated Japanese: make the environment, prepare the sample corpus, train, write a text.
#
#     ./quickstart.sh                         do all of it; a second run finds the environment and starts at once
#     ./quickstart.sh --install_only FILE     only make the environment, from a requirements file (used by run_tests.sh)
set -euo pipefail
trap '' PIPE # a tee that was killed must not end the work
cd "$(dirname "$0")"

find_python() { # print the name of a Python 3.10 or newer that has venv
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 or newer with venv was found; install one (on Debian or Ubuntu: apt install python3 python3-venv)" >&2
  exit 2
}

lock_environment() { # lock file 9 with Python $1, and with the flag $2 of flock; fail where another process holds it
  "$1" -c 'import errno, fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | getattr(fcntl, sys.argv[1], 0))
except OSError as error:
    if error.errno == errno.EWOULDBLOCK:
        sys.exit(1)
    print(f"warning: no locks here ({error.strerror}): run this once at a time", file=sys.stderr)' "$2"
}

make_environment() { # install the packages of $1, a requirements file, into .venv
  local stamp=".venv/installed_from_${1//\//_}"
  if cat requirements.txt "$1" constraints.txt | cmp -s - "$stamp"; then
    return
  fi
  local python
  python=$(find_python)
  mkdir -p .venv
  exec 9>>.venv/.lock # held until this process, and what it starts here, has ended; no more than a warning without locks
  if ! lock_environment "$python" LOCK_NB; then
    say "waiting for $(tail -n 1 .venv/.lock), which makes the environment .venv"
    lock_environment "$python" 0
  fi
  if cat requirements.txt "$1" constraints.txt | cmp -s - "$stamp"; then
    exec 9>&-
    return
  fi
  echo "process $$ on $(uname -n)" >>.venv/.lock
  say "making the environment .venv (this takes some minutes, once)"
  .venv/bin/python -c "import pip" 2>/dev/null || "$python" -m venv .venv || { # also one that was killed halfway
    echo "error: .venv could not be made; see above, and put the repository on a disk that has symbolic links" >&2
    exit 2
  }
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" -c constraints.txt || {
    echo "error: the packages of $1 could not be installed; see pip's messages above, then run this again" >&2
    exit 2
  }
  cat requirements.txt "$1" constraints.txt >"$stamp"
  exec 9>&-
}

say() { # print a line; where nobody reads it any more, continue
  printf '%s\n' "$*" 2>/dev/null || true
}

run() { # print a command, then run it
  say
  say "$ $*"
  "$@"
}

if [ "${1:-}" = --install_only ]; then
  make_environment "$2"
  exit
fi
if [ $# -gt 0 ]; then
  echo "error: quickstart.sh has no argument $1; run it without arguments" >&2
  exit 2
fi
make_environment requirements.txt
export PATH="$PWD/.venv/bin:$PATH"

run python dataset/prepare_aozora_jsonl.py --jsonl_path dataset/sample/sample.jsonl --output_dir dataset/sample_001
run python pretokenize.py --data_dir dataset/sample_001 --output_dir dataset/sample_001_pretok \
  --tokenizer sentencepiece --tokenizer_path dataset/sample/tokenizer --val_fraction 0.05
run python pretraining.py --data_dir dataset/sample_001 --use_pretokenized --output_dir quickstart_run \
  --tokenizer sentencepiece --tokenizer_path dataset/sample/tokenizer \
  --model_size micro --drop_rate 0.2 --n_epochs 4 --batch_size 8 --val_fraction 0.05 --eval_freq 20 \
  --print_sample_iter 70 --device cpu
run python inference.py --exp_dir quickstart_run --prompt "雨の匂いが" --max_new_tokens 200 --temperature 0.8 --top_k 40 \
  --device cpu
say
say "The loss curve: quickstart_run/loss_curve.png"
