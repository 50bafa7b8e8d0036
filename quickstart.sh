#!/usr/bin/env bash
# Take a fresh machine to generated Japanese: find a Python that can run quickstart.py, which says more and does the rest.
set -euo pipefail
cd "$(dirname "$0")"
for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    exec "$python" quickstart.py "$@"
  fi
done
echo "error: no Python 3.10 or newer was found; install one (on Debian or Ubuntu: apt install python3 python3-venv)" >&2
exit 2
