"""A clone by Git for Windows, whose core.autocrlf is true: scripts run, and bytes that are compared stay what they are."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def tree() -> list[str]:
    """Return the files of the working tree that git would add."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(listed, capture_output=True, text=True)
    names = [name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]
    if not names:
        pytest.skip("not a git checkout")
    return names


def test_a_clone_with_autocrlf_has_the_same_bytes(tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    names = tree()
    for name in names:
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, origin / name)
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.autocrlf=false")
    for arguments in (("init", "-q"), ("add", "-A", "-f"), ("commit", "-q", "-m", "all")):
        subprocess.run(["git", "-C", str(origin), *who, *arguments], check=True, capture_output=True)
    command = ["git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "clone", "-q", str(origin), str(clone)]
    subprocess.run(command, check=True, capture_output=True)
    different = [name for name in names if (clone / name).read_bytes() != (ROOT / name).read_bytes()]
    assert different == []
    assert {Path(name).suffix for name in names} >= {".sh", ".py", ".jsonl", ".model", ".png", ".safetensors"}
    scripts = [name for name in names if name.endswith(".sh")]
    assert scripts
    for name in scripts:
        assert b"\r" not in (clone / name).read_bytes()
        bash = None if os.name == "nt" else shutil.which("bash")  # Windows' own bash is WSL's, with other paths
        assert not bash or subprocess.run([bash, "-n", str(clone / name)], capture_output=True).returncode == 0
