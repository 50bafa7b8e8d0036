#!/usr/bin/env bash
# From a fresh machine to passed tests: environment, linter, types, shell scripts, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
./quickstart.sh --install_only tests/requirements.txt
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # two test processes on two cores
ruff check .
ruff format --check .
mypy
shellcheck quickstart.sh run_tests.sh exp001/command.sh benchmarks/gpu_suite.sh .ci/run
python -m pytest -n 2 --dist worksteal "$@"
