"""Checkpoints: bit for bit what was saved, whole or not at all, whatever happens to the process or the disk."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atp_jax.align.update import init_state, make_optimiser
from atp_jax.checkpoint import Checkpoints
from atp_jax.errors import UserError

HERE = Path(__file__).resolve().parent


def make_state(seed: int, width: int = 5):
    """A state of training that is not at its beginning, with numbers that survive no detour through text or float64."""
    draw = np.random.default_rng(seed)
    awkward = np.array([np.nan, np.inf, -0.0, 1e-45, np.float32(1) / 3], np.float32)
    trainable = {"a": jnp.asarray(draw.normal(size=(3, width)), jnp.float32), "b": jnp.asarray(awkward)}
    state = init_state(trainable, make_optimiser(1e-3, "linear", 10))
    filled = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype) if x.ndim else x + 7, state.optimiser
    )
    return state.replace(optimiser=filled, step=jnp.int32(7), skipped=jnp.int32(2))


def same_bits(one, other):
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def steps(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_nothing_saved_is_nothing_found(tmp_path):
    with Checkpoints(tmp_path / "deep" / "down") as checkpoints:
        assert checkpoints.latest(make_state(0)) is None and checkpoints.best(make_state(0)) is None


def test_a_state_comes_back_bit_for_bit_with_its_optimiser_and_extra(tmp_path):
    state, extra = make_state(1), {"cursor": [3, None], "rate": 0.1, "name": "π"}
    with Checkpoints(tmp_path, {"seed": 1}) as checkpoints:
        checkpoints.save(4, state, extra)
    with Checkpoints(tmp_path, {"seed": 1}) as checkpoints:
        step, found, also = checkpoints.latest(make_state(2))
    assert step == 4 and also == extra and type(found) is type(state)
    same_bits(found, state)


def test_numbers_of_python_stay_what_they_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"tokens": 2**40, "weights": jnp.ones(3, jnp.bfloat16)}, {})
        checkpoints.wait()
        _, found, _ = checkpoints.latest({"tokens": 0, "weights": jnp.zeros(3, jnp.bfloat16)})
    assert found["tokens"] == 2**40 and type(found["tokens"]) is int and found["weights"].dtype == jnp.bfloat16


def test_the_last_and_the_best_are_kept(tmp_path):
    metrics = {1: 0.1, 2: 0.9, 3: None, 4: 0.9, 5: -3.0, 6: None, 7: 0.5}
    like = {"x": jnp.zeros(2)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, {"x": jnp.full(2, step, jnp.float32)}, {}, metric=metric)
            checkpoints.wait()
            kept = {"1": {"1"}, "2": {"1", "2"}, "5": {"4", "5"}}.get(str(step))
            assert kept is None or steps(tmp_path) == kept
        assert steps(tmp_path) == {"4", "6", "7"}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest(like)[0] == 7
        step, found, _ = checkpoints.best(like)
        assert step == 4 and found["x"].tolist() == [4, 4]


def test_without_metrics_there_is_no_best_and_the_last_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in range(6):
            checkpoints.save(step, {"x": jnp.zeros(2)}, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert steps(tmp_path) == {"3", "4", "5"} and checkpoints.best({"x": jnp.zeros(2)}) is None


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    """On a CPU Orbax copies nothing: it must hold what it still reads, or the next update writes into it."""

    @jax.jit(donate_argnums=0)
    def update(state):
        return jax.tree.map(lambda x: x + 1, state)

    state = update({name: jnp.zeros((500, 1000)) for name in "abcdefgh"})
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(4):
            expected = float(state["a"][0, 0])
            checkpoints.save(step, state, {})
            for _ in range(10):
                state = update(state)
            jax.block_until_ready(state)
            checkpoints.wait()
            _, found, _ = checkpoints.latest(state)
            assert all(np.unique(array).tolist() == [expected] for array in jax.tree.leaves(found))


def test_a_state_in_memory_of_the_host_may_change_as_soon_as_save_returns(tmp_path):
    array = np.zeros((500, 1000), np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": array}, {})
        array += 1
        checkpoints.wait()
        assert not checkpoints.latest({"x": array})[1]["x"].any()


@pytest.mark.parametrize(
    ("identity", "change", "said"),
    [
        ({"beta": 0.1, "seed": 2}, lambda s: s, "another configuration: seed is 1 there and 2 here"),
        ({"seed": 1}, lambda s: s, "beta is 0.1 there and None here"),
        (None, lambda s: make_state(1, 6), r"trainable.a is float32\[3, 5\] there and float32\[3, 6\] here"),
        (
            None,
            lambda s: s.replace(step=jnp.float32(0)),
            r"another model: step is int32\[\] there and float32\[\] here",
        ),
        (None, lambda s: s.replace(trainable=s.trainable | {"c": s.step}), "it has 11 arrays and here are 12"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path, identity, change, said):
    mine = {"seed": 1, "beta": 0.1}
    with Checkpoints(tmp_path, mine) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    with Checkpoints(tmp_path, mine if identity is None else identity) as checkpoints:
        with pytest.raises(UserError, match=said) as refused:
            checkpoints.latest(change(make_state(1)))
    assert "\n" not in str(refused.value) and str(refused.value).startswith(
        f"{tmp_path / '1'} is a checkpoint of another"
    )


def test_an_identity_of_tuples_is_the_one_it_was(tmp_path):
    identity = {"items": (3, 5), "rewards": (1, 0.0, 0)}
    for step in (1, 2):
        with Checkpoints(tmp_path, identity) as checkpoints:
            assert (checkpoints.latest({"x": jnp.zeros(1)}) is None) == (step == 1)
            checkpoints.save(step, {"x": jnp.zeros(1)}, {})


@pytest.mark.parametrize("name", ["my runs", "ä'(1),{b}#%20", "what*?"])
def test_unusual_names_of_directories_hold_checkpoints(tmp_path, name):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(1)}, {})
    with Checkpoints(tmp_path / name) as checkpoints:
        assert checkpoints.latest({"x": jnp.zeros(1)})[1]["x"] == 1


@pytest.mark.parametrize("name", ["lr[0]", "a\\b"])
def test_names_that_could_not_be_read_again_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="use another workdir"):
        Checkpoints(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_steps_of_the_old_form_are_read_and_replaced(tmp_path):
    """One unnamed part, arrays by number, no extra: what trainings saved that are still to be finished."""
    state = make_state(3)
    numbered = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(8, args=ocp.args.StandardSave(numbered))
        manager.save(9, args=ocp.args.StandardSave(numbered))
    with Checkpoints(tmp_path) as checkpoints:
        step, found, extra = checkpoints.latest(make_state(4))
        assert step == 9 and extra == {}
        same_bits(found, state)
        checkpoints.save(10, make_state(5), {})
        checkpoints.save(11, make_state(6), {})
    with Checkpoints(tmp_path) as checkpoints:
        assert steps(tmp_path) == {"10", "11"}
        same_bits(checkpoints.latest(make_state(4))[1], make_state(6))


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    for step in (2, 5):
        (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
        (tmp_path / f"{step}.orbax-checkpoint-tmp" / "state").write_text("torn")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest({"x": jnp.zeros(3)})[0] == 1
        checkpoints.save(2, {"x": jnp.ones(3)}, {})
    assert steps(tmp_path) == {"1", "2"}


def python(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SAVES = """
import sys
from pathlib import Path
import jax.numpy as jnp
from atp_jax.checkpoint import Checkpoints

with Checkpoints(Path(sys.argv[1])) as checkpoints:
    for step in range(10**6):
        checkpoints.save(step, {str(i): jnp.full(100_000, step * 31 + i) for i in range(12)}, {"step": step})
        print(step, flush=True)
"""


def test_killed_while_saving_the_step_before_is_good(tmp_path):
    draw = random.Random(0)
    children = [python(SAVES, tmp_path / str(i)) for i in range(4)]
    try:
        for i, child in enumerate(children):
            for _ in range(2 + i):
                assert (line := child.stdout.readline()), child.communicate()[1]
            while not any("tmp" in name for name in steps(tmp_path / str(i))):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.01) * i)  # the first one surely within a step, the others anywhere
            child.kill()
            begun = int((line + child.stdout.read()).split()[-1])  # by then it had waited for the one before
            like = {str(k): jnp.zeros(100_000, int) for k in range(12)}
            with Checkpoints(tmp_path / str(i)) as checkpoints:
                step, found, extra = checkpoints.latest(like)
                assert begun - 1 <= step <= begun + 1 and extra == {"step": step}
                assert all((found[str(k)] == step * 31 + k).all() for k in range(12))
                checkpoints.save(step + 1, like, {})
    finally:
        for child in children:
            child.kill()
            child.communicate()


FILLS = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from atp_jax.checkpoint import Checkpoints
from atp_jax.errors import UserError

directory, limit = Path(sys.argv[1]), int(sys.argv[2])
noise = jnp.asarray(np.random.default_rng(0).normal(size=3_000_000), jnp.float32)
with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, {"x": jnp.arange(1000)}, {"at": 1})
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, {"x": noise}, {"at": 2})
        if sys.argv[3:] == ["again"]:  # then the next save tells
            checkpoints.save(3, {"x": noise}, {"at": 3})
            print("unexpected")
        checkpoints.wait()
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Checkpoints(directory) as checkpoints:
    step, found, extra = checkpoints.latest({"x": jnp.zeros(1000, int)})
    assert step == 1 and extra == {"at": 1} and (found["x"] == jnp.arange(1000)).all()
    checkpoints.save(2, {"x": jnp.zeros(1000, int)}, {"at": 2})
"""


def check_full(child: subprocess.Popen, directory: Path, answer: str) -> None:
    """One line and nothing else, and what was saved before is good (the child itself has looked)."""
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert out.splitlines() == [
        f"cannot write a checkpoint in {directory}: {answer}; the last complete one there is good, and the same "
        "command goes on from it"
    ]
    assert not err
    assert steps(directory) == {"1", "2"}


def test_a_file_that_may_not_grow_ends_in_one_line_and_the_step_before_stays(tmp_path):
    children = [python(FILLS, tmp_path / "wait", 200_000), python(FILLS, tmp_path / "save", 200_000, "again")]
    for child, name in zip(children, ("wait", "save"), strict=True):
        check_full(child, tmp_path / name, "File too large")


def test_a_full_disk_ends_in_one_line_and_the_step_before_stays(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        check_full(python(FILLS, tmp_path / "c", 0), tmp_path / "c", "No space left on device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
