"""The benchmark of the testbeds runs and says what it measured; how fast it is depends on the machine."""

import json
import os
import subprocess
import sys

import pytest

from atp_jax.benchmarks.envs import measure


@pytest.mark.parametrize("agents", [2, 8])
def test_it_measures_both_testbeds(agents):
    result = measure(games=2, agents=agents, rounds=1, repeats=1)
    assert (result["games"], result["agents"], result["rounds"], result["repeats"]) == (2, agents, 1, 1)
    for key in ("agent_steps_per_s", "episode_steps_per_s", "threshold_game_s", "role_play_s"):
        assert result[key] > 0, key
    assert {"device", "devices", "cores", "dtype", "compile_s", "jax", "jaxlib", "numpy"} <= set(result)


def test_the_command_prints_one_line_of_json(request):
    command = [sys.executable, "-m", "atp_jax.benchmarks.envs", "--games=2", "--agents=2", "--rounds=1", "--repeats=1"]
    done = subprocess.run(
        command, cwd=request.config.rootpath, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert json.loads(line)["agent_steps_per_s"] > 0
