"""Saving and restoring a state of arrays. The only file that knows Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def _leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by number: what is stored does not depend on the classes the tree is made of."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _manager(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))


def save(directory: Path, step: int, tree: Any) -> None:
    """Writes `tree` as step `step` of `directory`, whole or not at all; the last two steps are kept."""
    with _manager(directory) as manager:
        manager.save(step, args=ocp.args.StandardSave(_leaves(tree)))


def restore(directory: Path, like: Any) -> tuple[int, Any]:
    """The latest step in `directory` and its tree, shaped and placed as `like`; (0, like) where nothing was saved."""
    with _manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return 0, like
        leaves = manager.restore(step, args=ocp.args.StandardRestore(_leaves(like)))
    return step, jax.tree.unflatten(jax.tree.structure(like), [leaves[key] for key in sorted(leaves)])
