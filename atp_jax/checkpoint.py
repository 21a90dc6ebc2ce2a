"""Saving and restoring the state of a training. The only file that knows Orbax.

A step is one atomic item: the arrays, and a JSON object beside them (where the data stands, what was measured). Arrays
are stored by number, so what is stored does not depend on the classes the state is made of.
"""

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from atp_jax.errors import UserError

# What a disk answers that is full, over quota, limited, protected or broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)
# The parts of a step. One saved before steps had an extra has a single part, OLD.
STATE, EXTRA, OLD = "state", "extra", "default"

# What fails in a thread of Orbax is raised by the next call here; that it prints the trace as well helps nobody.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class Checkpoints:
    """The checkpoints in a directory, the last `keep` and the best; a context, which waits for what is being written.

    identity: what makes two trainings the same one (JSON values); a checkpoint of another is refused.
    """

    def __init__(self, directory: Path, identity: Mapping | None = None, keep: int = 2):
        self._directory = Path(directory).absolute()
        if set("[\\") & set(str(self._directory)):
            # Orbax takes it for a pattern, finds nothing to put together, and keeps steps that cannot be read.
            raise UserError(
                f"{self._directory} cannot hold checkpoints: no [ or \\ may be in its name; use another workdir"
            )
        self._identity = json.loads(json.dumps(dict(identity or {})))  # as it comes back from a file
        kept = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            best_fn=_metric,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # what a killed process left half-written
        )
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

    def save(self, step: int, state: Any, extra: Mapping, metric: float | None = None) -> None:
        """Begins to write a step; the arrays may be donated as soon as this returns. metric: the larger the better.

        UserError if this step or the one before could not be written (a full disk): the last complete one stays.
        """
        state = ocp.args.StandardSave(_by_number(jax.tree.leaves(state)))
        extra = ocp.args.JsonSave({"identity": self._identity, **extra})
        with self._writing():
            self._manager.save(
                step, args=ocp.args.Composite(**{STATE: state, EXTRA: extra}), metrics={"metric": metric}, force=True
            )

    def wait(self) -> None:
        """Returns when everything is on disk. UserError as in `save`."""
        with self._writing():
            self._manager.wait_until_finished()

    def latest(self, like: Any) -> tuple[int, Any, dict] | None:
        """(step, state, extra) of the last complete step, arrays shaped and placed as in `like`; None without any.

        UserError for a checkpoint of another configuration, naming what differs.
        """
        step = self._manager.latest_step()
        return None if step is None else self._restore(step, like)

    def best(self, like: Any) -> tuple[int, Any, dict] | None:
        """The same of the step with the largest metric, the later of equals; None if none was saved with a metric."""
        step = self._manager.best_step()
        if step is None or _metric(self._manager.metrics(step)) == -math.inf:
            return None
        return self._restore(step, like)

    def _restore(self, step: int, like: Any) -> tuple[int, Any, dict]:
        where = self._directory / str(step)
        wanted = _by_number(jax.tree.leaves(like))
        if (where / OLD).exists():
            with ocp.StandardCheckpointer() as old:
                found, extra = old.restore(where / OLD, wanted), {}
        else:
            extra = self._manager.restore(step, args=ocp.args.Composite(**{EXTRA: ocp.args.JsonRestore()}))[EXTRA]
            self._check_identity(where, extra.pop("identity"))
            self._check_arrays(where, self._manager.item_metadata(step)[STATE], like)
            restore = ocp.args.StandardRestore(wanted)
            found = self._manager.restore(step, args=ocp.args.Composite(**{STATE: restore}))[STATE]
        return step, jax.tree.unflatten(jax.tree.structure(like), [found[number] for number in sorted(found)]), extra

    def _check_identity(self, where: Path, there: dict) -> None:
        here = self._identity
        differing = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"{where} is a checkpoint of another configuration: {name} is {there.get(name)!r} there and "
                f"{here.get(name)!r} here; use another workdir"
            )

    def _check_arrays(self, where: Path, stored: Any, like: Any) -> None:
        here = jax.tree.leaves_with_path(like)
        there = [leaf for _, leaf in sorted(stored.items())]
        if len(there) != len(here):
            raise UserError(
                f"{where} is a checkpoint of another model: it has {len(there)} arrays and here are {len(here)}; use "
                "another workdir"
            )
        for (path, leaf), found in zip(here, there, strict=True):
            if not isinstance(leaf, int | float) and _kind(found) != _kind(leaf):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise UserError(
                    f"{where} is a checkpoint of another model: {name} is {_kind(found)} there and {_kind(leaf)} here; "
                    "use another workdir"
                )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what a failing disk raises into the one line a user can act on."""
        try:
            yield
        except Exception as error:
            cause = error
            while not (said := _of_the_disk(cause)):
                cause = cause.__cause__ or cause.__context__
                if cause is None:
                    raise
            raise UserError(
                f"cannot write a checkpoint in {self._directory}: {said}; the last complete one there is good, and the "
                "same command goes on from it"
            ) from error


def _by_number(leaves: list) -> dict[str, Any]:
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}


def _metric(metrics: Mapping | None) -> float:
    value = (metrics or {}).get("metric")
    return -math.inf if value is None else value


def _kind(array: Any) -> str:
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _of_the_disk(error: BaseException) -> str:
    """What the disk answered, in words; empty for any other error."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in DISK else ""
    said = str(error)  # tensorstore says it in words
    return next((os.strerror(number) for number in DISK if os.strerror(number) in said), "")
