# shellcheck shell=bash
# What a rented machine needs around a training, for command.sh, which reads this file in its experiment folder:
# signals passed on, the right Python with its packages, a GPU that torch can use, and the pod stopped at the end.

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

pass_on_signals() { # from here on
  trap 'forward TERM' TERM
  trap 'forward INT' INT
  trap 'forward HUP' HUP # no effect under nohup: bash keeps ignoring a signal that was ignored when it started
}

run() { # run a command while this script handles signals; return the command's exit code
  [ -z "$signalled" ] || return 75
  "$@" &
  while kill -0 $! 2>/dev/null; do wait $! || true; done # a signal ends wait but not the command
  wait $!
}

find_python() { # set $python: the environment .venv or else another Python that has torch, else one to install it into
  local has_torch='import importlib.metadata; importlib.metadata.version("torch")' needed candidate
  for needed in "$has_torch" 'assert sys.version_info < (3, 15)'; do # there are no wheels for 3.15
    for candidate in ../.venv/bin/python python3 python python3.13 python3.12 python3.11 python3.10; do
      if "$candidate" -c "import sys; assert sys.version_info >= (3, 10); $needed" 2>/dev/null; then
        python=$candidate
        return
      fi
    done
  done
  echo "error: no Python from 3.10 to 3.14 was found; install one (on Debian or Ubuntu: apt install python3 python3-venv)" >&2
  return 2
}

require_gpu() { # end here where there is a GPU that torch cannot use; the settings $@ may name another device
  run env PYTHONPATH="..${PYTHONPATH:+:$PYTHONPATH}" "$python" -W ignore -c 'import argparse, sys
from gptkit.base.drivers import gpu_problem
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--device", default="auto")
device = parser.parse_known_args()[0].device
try:
    problem = gpu_problem(device)
    if problem:
        problem += " (write --device cpu into settings of command.sh)"
except Exception as error:
    problem = f"torch cannot be imported by {sys.executable} ({error}); install it anew"
if problem:
    print(f"error: --device {device}: {problem}", file=sys.stderr)
    sys.exit(2)' "$@"
}

prepare_python() { # set $python to one that has all packages, and check its torch against the GPU, for the settings $@
  find_python || return
  require_gpu "$@" || return # before anything is downloaded
  if ! run "$python" ../cloud/install_packages.py --check ../requirements.txt; then
    run "$python" ../cloud/install_packages.py ../requirements.txt || return
    find_python || return # in an environment that it may have made
    require_gpu "$@" || return
  fi
}

find_python 2>/dev/null || python= # prepare_python reports it

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
  elif [ -n "$python" ] && is_training; then # another command.sh, or a pretraining.py started by hand: this one was refused
    echo "another run is training in model_checkpoints"
  fi
}

pod_status() { # print the pod's status: from the JSON of runpodctl 2, or from the table of earlier versions
  runpodctl pod get "$RUNPOD_POD_ID" 2>/dev/null | sed -n 's/^ *"desiredStatus": *"\([A-Z]*\)".*/\1/p' | grep . ||
    runpodctl get pod "$RUNPOD_POD_ID" 2>/dev/null | awk -v id="$RUNPOD_POD_ID" 'tolower($1) == tolower(id) { print $NF }'
}

stop_pod() { # stop the pod, unless the exit code $1 shows that a signal ended the run
  local problem printed status
  problem=$(pod_problem)
  if [ "$1" -eq 75 ]; then
    problem="a signal ended the run; run the same command to resume"
  fi
  if [ -n "$problem" ]; then
    say "the pod is not stopped: $problem"
    return
  fi
  for _ in 1 2 3 4 5 6; do # the network may fail
    printed=$(runpodctl pod stop "$RUNPOD_POD_ID" 2>&1) || printed+=$'\n'$(runpodctl stop pod "$RUNPOD_POD_ID" 2>&1) || true
    # What it prints does not count: earlier versions end with exit code 0 where the pod keeps running.
    status=$(pod_status) || true
    case $status in
      EXITED | STOPPED | TERMINATED)
        say "the pod is stopped"
        return
        ;;
    esac
    sleep 5
  done
  printed=$(tr -s '[:space:]' ' ' <<<"$printed")
  say "the pod is not stopped: its status is ${status:-unknown}; stop it by hand (runpodctl printed: ${printed% })"
}
