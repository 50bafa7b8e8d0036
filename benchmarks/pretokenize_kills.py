"""SIGKILL at random moments of a parallel pretokenize.py, the same command again each time: nothing done is redone.

python benchmarks/pretokenize_kills.py --data_dir dataset/001 --hf_name rinna/japanese-gpt2-small
"""

import argparse
import hashlib
import random
import subprocess
import tempfile
import time
from pathlib import Path

from machine import script, write_result


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--hf_name", required=True)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    tokenize = script("pretokenize.py", data_dir=options.data_dir, hf_name=options.hf_name, num_workers=2)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        start = time.monotonic()
        subprocess.run([*tokenize, "--output_dir", str(whole)], check=True, capture_output=True)
        whole_s = time.monotonic() - start
        draw, n_redone = random.Random(20), 0
        moments_s: list[float] = []
        finished_after: list[int] = []
        while len(moments_s) < options.kills:
            finished = {path: path.stat().st_mtime_ns for path in killed.glob("combined_*.json")}
            if len(finished) == len(list(whole.glob("combined_*.json"))):
                for path in killed.iterdir():  # all done: begin anew, so that each kill meets work
                    path.unlink()
                finished = {}
            process = subprocess.Popen([*tokenize, "--output_dir", str(killed)], stderr=subprocess.DEVNULL)
            moment_s = draw.uniform(0, whole_s)
            time.sleep(moment_s)
            if process.poll() is not None:  # it ended before the kill
                continue
            process.kill()
            process.wait()
            n_redone += sum(path.stat().st_mtime_ns != before for path, before in finished.items())
            moments_s.append(round(moment_s, 2))
            finished_after.append(len(list(killed.glob("combined_*.json"))))
        subprocess.run([*tokenize, "--output_dir", str(killed)], check=True, capture_output=True)
        result = {
            "kills": options.kills,
            "moments_s": moments_s,
            "shards": len(list(whole.glob("combined_*.json"))),
            "finished_shards_after_each_kill": finished_after,
            "finished_shards_redone": n_redone,
            "byte_identical": hashes(whole) == hashes(killed),
        }
    write_result("pretokenize_kills", result)


if __name__ == "__main__":
    main()
