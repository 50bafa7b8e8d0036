"""Importing this module lets a check import the modules of benchmarks/, and by machine.py gpt_model and gptkit too."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
