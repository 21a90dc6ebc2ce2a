"""The command line.

    python -m atp_jax --config=configs/quickstart.py --workdir=runs/quickstart [--config.evolve.rounds=10 ...]
                      [--stages=evolve,report]

--config    a Python file with get_config(arg=""); FILE:ARG passes ARG
--config.X  any setting of it, as in --config.evolve.rounds=10 or --config.data.items="(3, 5)"
--workdir   where the run is kept: the same command again resumes it, or shows its result again
--stages    which stages run, in place of those the config names
--plan      shows what the run would need of its devices and does nothing; --plan=8xH100-80 on that many of that chip

In several processes the same command is started once a process (a host, as a rule), in a directory that all see:

--coordinator  host:port of process 0, any free port        (or JAX_COORDINATOR_ADDRESS)
--processes    how many there are                           (or JAX_NUM_PROCESSES)
--process_id   which one this is, from 0                    (or JAX_PROCESS_ID, in Kubernetes JOB_COMPLETION_INDEX)

Under srun of SLURM and on the hosts of a TPU slice these are found without being said.

--tensorboard    metrics.jsonl as TensorBoard's files as well, in tensorboard/ of the workdir (package tensorboardX)
--wandb=PROJECT  and as a run of Weights & Biases (package wandb)

Exit status 0; 2 with one line on stderr for anything that you can mend; 1 where the program or a process failed.
"""

if __name__ == "__main__":  # first of all: it starts the program again
    from atp_jax.memory import keep_memory

    keep_memory(__spec__)

import contextlib
import dataclasses
import os
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from atp_jax import experiment, processes, settings
from atp_jax.errors import UserError
from atp_jax.interrupt import Interrupted
from atp_jax.mirror import mirror

PROCESSES = ("coordinator", "processes", "process_id")


class _Optional(flags.ArgumentParser):
    """A value or nothing: `--config.evolve.window=None` is as good as `=5`."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, argument):
        return None if argument in (None, "None", "null") else self.parser.parse(argument)

    def flag_type(self) -> str:
        return f"{self.parser.flag_type()} or None"


class _Tuple(flags.ArgumentParser):
    """A tuple, of which the last one given counts: the parser of ml_collections would join those of repeated flags."""

    def parse(self, argument):
        return tuple_parser.TupleParser().parse(argument)

    def flag_type(self) -> str:
        return "tuple"


config_flags.register_flag_parser_for_type(tuple, _Tuple())
# The types that settings.to_config gives its optional fields.
config_flags.register_flag_parser_for_type(int | None, _Optional(flags.IntegerParser()))
config_flags.register_flag_parser_for_type(int | float | None, _Optional(flags.FloatParser()))
config_flags.register_flag_parser_for_type(bool | None, _Optional(flags.BooleanParser()))


def load_config(path_and_arg: str) -> ConfigDict:
    """What `get_config` of the Python file returns; `FILE:ARG` passes ARG. UserError when the file does not give it."""
    path, _, arg = path_and_arg.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file {path}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise UserError(f"--config: {path} has no function get_config")
        return get_config(arg) if arg else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a file of the user's can raise
        raise UserError(f"--config: {path}: {type(error).__name__}: {error}") from error


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """`config` with `--config.NAME=VALUE` of `arguments` set, by the types of its fields."""
    for argument in arguments:
        if named := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            settings.check_name(named[1])
    argv = ["atp_jax", *arguments]
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
    left = flag_values(argv)[1:]
    if left:
        raise UserError(f"argument {left[0]!r} means nothing here; settings are written --config.NAME=VALUE")
    return flag_values.config


def parse(arguments: Sequence[str]) -> tuple[settings.Settings, Path, dict]:
    """The settings in force, the workdir, and where metrics are shown besides. Raises UserError for anything wrong,
    having written nothing."""
    flag_values = flags.FlagValues()
    flags.DEFINE_string("config", None, "config file", flag_values=flag_values)
    flags.DEFINE_string("workdir", None, "where the run is kept", flag_values=flag_values)
    flags.DEFINE_list("stages", None, "stages to run", flag_values=flag_values)
    flags.DEFINE_bool("tensorboard", False, "metrics as TensorBoard's files as well", flag_values=flag_values)
    flags.DEFINE_string("wandb", None, "project of Weights & Biases", flag_values=flag_values)
    for name in PROCESSES:
        flags.DEFINE_string(name, None, "see processes.py", flag_values=flag_values)
    try:
        left = flag_values(["atp_jax", *arguments], known_only=True)[1:]
        if not flag_values.config:
            raise UserError("--config=FILE is missing, as in --config=configs/quickstart.py")
        if not flag_values.workdir:
            raise UserError("--workdir=DIRECTORY is missing, as in --workdir=runs/quickstart")
        config = settings.to_config(settings.read_settings(load_config(flag_values.config)))
        chosen = settings.read_settings(override(config, left))
    except flags.Error as error:
        raise UserError(str(error)) from error
    if flag_values.stages is not None:
        if not any(flag_values.stages):
            raise UserError("--stages is empty: nothing would be done")
        chosen = dataclasses.replace(chosen, stages=tuple(flag_values.stages))
    shown = {"tensorboard": flag_values.tensorboard, "wandb": flag_values.wandb}
    return settings.check_settings(chosen), Path(flag_values.workdir), shown


def keep_compilations() -> None:
    """What XLA compiled is kept between runs, under the user's cache directory unless JAX was told another."""
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "atp_jax" / "compilations"))


def join(arguments: Sequence[str]) -> None:
    """Joins the other processes, if this is one of several."""
    flag_values = flags.FlagValues()
    for name in PROCESSES:
        flags.DEFINE_string(name, None, "see processes.py", flag_values=flag_values)
    try:
        flag_values(["atp_jax", *arguments], known_only=True)
    except flags.Error as error:
        raise UserError(str(error)) from error
    launch = processes.find(*(flag_values[name].value for name in PROCESSES), os.environ)
    if launch is not None:
        processes.connect(launch)


def attempt(arguments: Sequence[str]) -> tuple[int, str]:
    """The run itself: its exit status, and what is to be said on stderr."""
    try:
        chosen, workdir, shown = parse(arguments)
        keep_compilations()
        with mirror(workdir, **shown, config=settings.flatten(chosen)):
            experiment.run(chosen, workdir)
    except UserError as error:
        return 2, "error: " + " ".join(str(error).split())
    except Interrupted as stopped:
        print(stopped, flush=True)
    except KeyboardInterrupt:
        return 130, "interrupted: the same command again goes on from the last finished round"
    except Exception:
        if processes.count() == 1:
            raise
        return 1, traceback.format_exc()
    return 0, ""


def show_plan(arguments: Sequence[str], said: str) -> int:
    """`--plan=said`: what the run of the other arguments would need. Nothing is written, no accelerator asked."""
    try:
        chosen, *_ = parse([*arguments, "--workdir=."])
        from atp_jax.plan import plan

        print(plan(chosen, said))
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line (without the program's name) and return its exit status."""
    if any(argument in ("-h", "-help", "--help", "--helpfull") for argument in arguments):
        print(__doc__)
        return 0
    plans = [argument for argument in arguments if re.fullmatch("--?plan(=.*)?", argument)]
    if plans:
        others = [argument for argument in arguments if argument not in plans]
        return show_plan(others, plans[-1].partition("=")[2])
    try:
        join(arguments)
    except UserError as error:
        return processes.end(2, "error: " + " ".join(str(error).split()))
    with contextlib.ExitStack() as stack:
        if not processes.leads():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return processes.end(*attempt(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
