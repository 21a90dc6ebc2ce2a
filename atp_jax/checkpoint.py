"""Saving and restoring the state of a training. The only file that knows Orbax.

A step is one atomic item: the arrays, and a JSON object beside them (where the data stands, what was measured). Arrays
are stored by number, so what is stored does not depend on the classes the state is made of.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from atp_jax.errors import UserError

# What a disk answers that is full, over quota, limited, protected or broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)
STATE, EXTRA = "state", "extra"


def _leaves(tree: Any) -> dict[str, Any]:
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


class Checkpoints:
    """The checkpoints in a directory; a context, which waits for what is still being written.

    identity: what makes two trainings the same one (JSON values); a checkpoint of another is refused.
    """

    def __init__(self, directory: Path, identity: Mapping | None = None, keep: int = 2):
        self._directory = Path(directory).absolute()
        self._identity = json.loads(json.dumps(dict(identity or {})))  # as it comes back from a file
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name, save, restore, handler in (
            (STATE, ocp.args.StandardSave, ocp.args.StandardRestore, ocp.StandardCheckpointHandler),
            (EXTRA, ocp.args.JsonSave, ocp.args.JsonRestore, ocp.JsonCheckpointHandler),
        ):
            handlers.add(name, save, handler())
            handlers.add(name, restore, handler())
        with self._writing():
            self._manager = ocp.CheckpointManager(self._directory, options=options, handler_registry=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with self._writing():
            self._manager.close()

    def save(self, step: int, state: Any, extra: Mapping) -> None:
        """Begins to write a step; the arrays may be donated as soon as this returns. UserError if an earlier step could
        not be written (a full disk): the last complete one stays."""
        state = ocp.args.StandardSave(_leaves(state))
        extra = ocp.args.JsonSave({"identity": self._identity, **extra})
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**{STATE: state, EXTRA: extra}), force=True)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def latest(self, like: Any) -> tuple[int, Any, dict] | None:
        """(step, state, extra) of the last complete step, arrays shaped and placed as in `like`; None without any.

        UserError for a checkpoint of another configuration, naming what differs.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = self._directory / str(step)
        extra = self._manager.restore(step, args=ocp.args.Composite(**{EXTRA: ocp.args.JsonRestore()}))[EXTRA]
        there = extra.pop("identity")
        differing = [name for name in sorted(there | self._identity) if there.get(name) != self._identity.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"{where} is a checkpoint of another configuration: {name} is {there.get(name)!r} there and "
                f"{self._identity.get(name)!r} here"
            )
        wanted = _leaves(like)
        stored = self._manager.item_metadata(step)[STATE]
        found = {name: tuple(leaf.shape) for name, leaf in dict(stored.items()).items()}
        shapes = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in wanted.items()}
        if found != shapes:
            name = next(name for name in sorted(found | shapes) if found.get(name) != shapes.get(name))
            raise UserError(
                f"{where} is a checkpoint of another model: array {name} has shape {found.get(name)} there and "
                f"{shapes.get(name)} here"
            )
        restored = self._manager.restore(step, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(wanted)}))
        leaves = restored[STATE]
        return step, jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in sorted(leaves)]), extra

    def _writing(self) -> "_Writing":
        return _Writing(self._directory)


class _Writing:
    """Turns what a failing disk raises into the one line a user can act on."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        while error is not None and not _of_the_disk(error):
            error = error.__cause__ or error.__context__
        if error is not None:
            raise UserError(
                f"cannot write a checkpoint in {self._directory}: {str(error).strip().partition(chr(10))[0]}; the last "
                "complete one is good"
            ) from error


def _of_the_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK
    return any(os.strerror(number) in str(error) for number in DISK)  # tensorstore says it in words
