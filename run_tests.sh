#!/usr/bin/env bash
# Make the environment, then run the linter, the type checker, shellcheck and the tests. Arguments are passed to pytest:
#
#     ./run_tests.sh                  all tests
#     ./run_tests.sh -m "not slow"    all but real runs of about 10 seconds and more
set -euo pipefail
cd "$(dirname "$0")"
./quickstart.sh --install_only tests/requirements.txt
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # two test processes share two cores
ruff check .
ruff format --check .
mypy
shellcheck quickstart.sh run_tests.sh exp001/command.sh cloud/machine.sh benchmarks/gpu_suite.sh benchmarks/torch_versions.sh .ci/run
python -m pytest -n 2 --dist worksteal "$@"
