"""--engine ray on a cluster of two local nodes writes the same bytes as the local run."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import SAMPLE_TOKENS, assert_user_error, command, environment


@pytest.mark.slow
def test_two_nodes_write_what_the_local_run_writes(tmp_path: Path, sample_shards: Path, sample_tokens: Path) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is an extra: pip install ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    arguments = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--output_dir", tmp_path / "ray", "--engine", "ray")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        result = subprocess.run(
            command("pretokenize.py", *arguments),
            env=environment() | {"RAY_ADDRESS": cluster.address},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
    finally:
        cluster.shutdown()
    assert result.returncode == 0, result.stderr
    assert "tokenized (new)" in result.stderr
    local, ray = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (sample_tokens, tmp_path / "ray"))
    assert local == ray


def test_without_ray_one_line_names_what_to_install(tmp_path: Path, sample_shards: Path) -> None:
    """A module of that name that cannot be imported hides Ray where it is installed."""
    (tmp_path / "ray.py").write_text("raise ImportError('no Ray here')")
    arguments = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--output_dir", tmp_path / "o", "--engine", "ray")
    result = subprocess.run(
        command("pretokenize.py", *arguments),
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
    )
    assert_user_error(result, "--engine ray needs Ray", "pip install ray")
