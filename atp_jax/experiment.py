"""The stages of a run in order, and what each leaves in the workdir.

          `config.json` before anything else, `metrics.jsonl` step by step and round by round
pairs     `pairs.jsonl`
dpo       `models/dpo`, and `checkpoints/dpo` on the way (alignment.py)
grpo      `models/grpo`, and `checkpoints/grpo` on the way
evolve    `evolve/<condition>/episodes.jsonl` round by round, and at the end `results.json`; not in lockstep, a
          `journal.jsonl` beside the former until all is lived through
report    `report/` from these, and the table on the terminal

`episodes.jsonl` and `results.json` depend on the configuration alone: a run that was killed and started again leaves
the same bytes, in lockstep. What depends on the machine (speed, versions, device) stands in `metrics.jsonl` and
`config.json`.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax

from atp_jax import analysis, processes
from atp_jax.errors import UserError
from atp_jax.files import append, exists, mend, read_json, read_lines, write_json
from atp_jax.interrupt import Interrupt, Interrupted
from atp_jax.lab import Lab, aligned, open_lab
from atp_jax.policies.scripted import ScriptedPolicy
from atp_jax.policies.types import Policy
from atp_jax.progress import Progress, describe_training
from atp_jax.rollout import Finished, run_conditions, run_freely
from atp_jax.settings import Settings, flatten
from atp_jax.testbeds import testbed
from atp_jax.testbeds.types import Condition

# What shows that a directory was used as a workdir.
LEAVINGS = ("pairs.jsonl", "checkpoints", "models", "evolve", "metrics.jsonl", "results.json")
PACKAGES = ("atp_jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


MODELS = ("base", "dpo", "grpo")


def models(settings: Settings) -> tuple[str, ...]:
    """The models that live through the conditions, in the order base, dpo, grpo."""
    if settings.policy.kind != "model":
        return (settings.policy.kind,)
    chosen = settings.evolve.models or ("base", *settings.align.method.replace("none", "").split("+"))
    return tuple(model for model in MODELS if model in chosen)


def conditions(settings: Settings) -> list[Condition]:
    """Those of the testbed for each model in turn (`base`, `base-no_history`, `dpo`, ...), and one a model that evolves
    in its weights: `dpo-weights`."""
    found = []
    for model in models(settings):
        place = MODELS.index(model) if model in MODELS else 0
        if settings.evolve.mode in ("context", "both"):
            found += testbed(settings).conditions(settings, model, place)
        if settings.evolve.mode in ("weights", "both"):
            found.append(Condition(10_000 * (place + 1), f"{model}-weights", model, "none", "weights"))
    return found


def deployed(lab: Lab, name: str, workdir: Path) -> Lab:
    """The lab with the model of these conditions: the base, or one that an earlier stage made."""
    if name not in MODELS or name == "base":
        return lab
    return dataclasses.replace(lab, model=aligned(lab.model, workdir / "models" / name))


def make_policy(settings: Settings, lab: Lab, episodes: int) -> Policy:
    """What answers: the script, or the lab's model."""
    if lab.model is None:
        policy, bed = ScriptedPolicy(settings.policy.script), testbed(settings)
        policy.require(episodes, settings.evolve.rounds, bed.asked(settings), bed.FIRST)
        return policy
    from atp_jax.policies.model import ModelPolicy

    return ModelPolicy(lab.model, lab.sampling, settings.seed, settings.sampling.thinking, rows=settings.policy.rows)


def _machine() -> dict:
    """Versions and device: recorded, never compared."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = None
    device = jax.devices()[0]
    about = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
    return {"versions": versions, "device": about | {"processes": processes.count()}}


def _started(settings: Settings, workdir: Path) -> str:
    """What must be the same in all processes."""
    about = {"config": _configuration(settings), "stages": settings.stages, "workdir": str(workdir)}
    return json.dumps(about | ({"versions": _machine()["versions"]} if processes.count() > 1 else {}))


def _configuration(settings: Settings) -> dict:
    """What must be the same when a workdir is used again, as JSON gives it back. Which stages run may differ."""
    return json.loads(json.dumps({name: value for name, value in flatten(settings).items() if name != "stages"}))


def _refuse_difference(workdir: Path, recorded: dict, now: dict, what: str) -> None:
    differing = [name for name in sorted(recorded | now) if recorded.get(name) != now.get(name)]
    if differing:
        pairs = ", ".join(f"{name} ({recorded.get(name)!r} there, {now.get(name)!r} now)" for name in differing)
        raise UserError(f"{workdir} holds a run with {what}: {pairs}; use another workdir")


@contextmanager
def _workdir_for(workdir: Path, document: dict) -> Iterator[None]:
    """Make the workdir and its `config.json`; if a run that began here fails within its first round, both go again.

    OSError in here (no permission, disk full) is the user's to mend as well.
    """
    new = [path for path in (workdir, *workdir.parents) if not path.exists()]
    config = workdir / "config.json"
    fresh = not exists(config)
    try:
        if processes.leads():
            workdir.mkdir(parents=True, exist_ok=True)
        if fresh:
            write_json(config, document)
        _see(config)
        with _held(config) if processes.leads() else nullcontext():
            yield
    except _Taken:
        raise
    except (UserError, OSError) as error:
        begun = (workdir / "metrics.jsonl").exists() or any(workdir.glob("evolve/*/journal.jsonl"))
        if fresh and processes.leads() and not begun:
            for name in ("evolve", "checkpoints"):
                shutil.rmtree(workdir / name, ignore_errors=True)
            config.unlink(missing_ok=True)
            for path in new:
                if path.is_dir():
                    path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {error.filename or workdir}: {error.strerror or error}") from error
        raise


class _Taken(UserError):
    """The workdir is another's, and nothing in it is ours to take away."""


@contextmanager
def _held(config: Path) -> Iterator[None]:
    """Nobody else runs in this workdir meanwhile. The lock lies on its config.json and ends with the process, however
    that ends; a disk that knows no locks has none."""
    with config.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = f"{config.parent} is in use by another run; wait for its end or use another workdir"
            raise _Taken(said) from error
        except OSError:
            pass
        yield


def _see(path: Path) -> None:
    """UserError where a process does not see what process 0 has written; a shared disk may need some seconds."""
    processes.wait()
    for _ in range(20):
        if path.exists():
            return
        time.sleep(0.5)
    raise UserError(f"{path} is not there, though process 0 has it: the workdir must be on a disk that all hosts share")


def _check_place(workdir: Path) -> None:
    """Raise UserError where a workdir plainly cannot be, before anything is loaded for it."""
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write {workdir}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {workdir}: no permission to write in {there}")


def _episodes_file(workdir: Path, condition: Condition) -> Path:
    return workdir / "evolve" / condition.name / "episodes.jsonl"


def _length(record: dict) -> int:
    """Tokens that were sampled for a record, in all its turns where it took several."""
    return sum(len(turn["tokens"]) for turn in record.get("turns", [record]))


def _metrics(finished: Finished) -> dict:
    decisions = [record["decision"] for record in finished.records if not record.get("fixed")]
    return {
        "stage": "evolve",
        "condition": finished.condition.name,
        "round": finished.round,
        "violations": decisions.count("violate"),
        "unparsed": decisions.count("unparsed"),
        "total": len(decisions),
        "cut_off": sum(record["finish"] == "length" for record in finished.records),
        "tokens": 0 if finished.read_back else sum(map(_length, finished.records)),
        "seconds": finished.seconds if finished.seconds is None else round(finished.seconds, 3),
    }


def evolve(settings: Settings, workdir: Path, lab: Lab) -> None:
    """Live through every condition, then write `results.json`. Goes on from the last finished round
    (not in lockstep: of each episode); SIGTERM stops it after the round it is in."""
    bed = testbed(settings)
    scenarios = bed.scenarios(settings)
    # How the work is spread over devices and batches is no part of a condition, nor are another testbed's rules.
    own = {"threshold_game": "game.", "tool_use": "tool."}.get(settings.testbed)
    foreign = tuple(group for group in ("mesh.", "game.", "tool.") if group != own)
    setting = {
        name: value
        for name, value in _configuration(settings).items()
        if not name.startswith(foreign) and name not in ("policy.rows", "evolve.lockstep", "evolve.ahead")
    } | _in_force(lab)
    cells = conditions(settings)
    summaries = []
    metrics_file = workdir / "metrics.jsonl"
    mend(metrics_file)
    # A run killed between a round and its line has the round alone: the line is added when the round is read back.
    told = {(line.get("condition"), line.get("round")) for line in read_lines(metrics_file)}
    looks = -(-settings.evolve.weights.updates // settings.evolve.weights.measure_every) + 1
    lasting = settings.evolve.rounds + 1 - bed.FIRST
    probed = []
    total = sum(looks if cell.mode == "weights" else lasting for cell in cells)
    with Interrupt(signal.SIGTERM) as interrupt, Progress(total) as progress:

        def on_round(finished: Finished) -> None:
            metrics = _metrics(finished)
            if not finished.read_back or (metrics["condition"], metrics["round"]) not in told:
                append(metrics_file, [metrics])
            progress.advance(metrics)
            if not finished.read_back:
                stop_if_asked(f" after round {metrics['round']} of {metrics['condition']}")

        def stop_if_asked(where: str = "") -> None:
            if asked := processes.first(interrupt.asked):
                raise Interrupted(f"stopped by {asked}{where}; the same command goes on from there")

        for name in models(settings):
            worn = deployed(lab, name, workdir)
            policy = make_policy(settings, worn, len(scenarios) * settings.evolve.samples)
            in_context = [cell for cell in cells if cell.model == name and cell.mode == "context"]
            lived = []
            for together in _batches(in_context, settings, len(scenarios)):
                paths = [_episodes_file(workdir, condition) for condition in together]
                what = together, scenarios, policy, lab.wording, settings, paths, on_round
                found = run_conditions(*what) if settings.evolve.lockstep else run_freely(*what, stop_if_asked)
                lived += zip(together, found, strict=True)
            for condition in (cell for cell in cells if cell.model == name and cell.mode == "weights"):
                from atp_jax import alignment

                path = _episodes_file(workdir, condition)
                found = alignment.evolve_weights(settings, workdir, worn, condition, scenarios, path, on_round)
                lived.append((condition, found))
            for condition, records in lived:
                own = setting | {"evolve.mode": condition.mode} | condition.setting
                summaries.append(bed.summarise(condition, own, records, settings.seed))
            if settings.evolve.probe:
                from atp_jax.probe import probe

                probed += probe(settings, name, worn.model, worn.sampling, worn.wording, scenarios)
    results = {"schema": 1, "testbed": settings.testbed, "conditions": summaries}
    write_json(workdir / "results.json", results | ({"probe": probed} if probed else {}))


def _batches(cells: Sequence[Condition], settings: Settings, scenarios: int) -> Iterator[Sequence[Condition]]:
    """The conditions of a model that live through their rounds together: as many as `policy.rows` lets be answered at
    once, so that what was read in one round is kept for the next."""
    bed, rows = testbed(settings), settings.policy.rows
    a_condition = scenarios * settings.evolve.samples * len(bed.asked(settings))
    size = 1 if not bed.TOGETHER else len(cells) if rows is None else max(1, rows // a_condition)
    return (cells[begin : begin + size] for begin in range(0, len(cells), size))


def _in_force(lab: Lab) -> dict:
    values = dataclasses.asdict(lab.sampling) if lab.sampling else {}
    return {f"sampling.{name}": value for name, value in values.items()}


def _check_scenarios(settings: Settings, lab: Lab) -> None:
    """Whatever the scenarios could fail by later, and what the user should know of them."""
    bed = testbed(settings)
    scenarios = bed.scenarios(settings)
    processes.alike("what is in the scenarios or the wording", repr(scenarios) + repr(lab.wording))
    for note in bed.notes(settings, scenarios, lab.wording):
        print("note:", note)
    if lab.model is None:
        make_policy(settings, lab, len(scenarios) * settings.evolve.samples)


def _align(stage: str, settings: Settings, workdir: Path, lab: Lab) -> None:
    from atp_jax import alignment  # here, so that a scripted run starts without what training needs

    if stage == "pairs":
        alignment.collect_pairs(settings, workdir, lab)
    else:
        train = alignment.train_dpo if stage == "dpo" else alignment.train_grpo
        train(settings, workdir, lab, lambda line: print(describe_training(line), flush=True))


def report(settings: Settings, workdir: Path) -> None:
    """Write `report/` from what `evolve` left, and print the table."""
    results = read_json(workdir / "results.json")
    if results is None:
        raise UserError(f"{workdir} holds no results to report: run the stage evolve first")
    records = {}
    for condition in conditions(settings):
        path = _episodes_file(workdir, condition)
        try:
            with path.open(encoding="utf-8") as file:
                records[condition.name] = [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
    try:
        analysis.write_report(workdir, results, records)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or workdir}: {error.strerror or error}") from error
    analysis.print_table(results)
    print(f"\nreport: {workdir / 'report' / 'index.html'}")


def _finished(stage: str, workdir: Path) -> bool:
    left = {"pairs": "pairs.jsonl", "dpo": "models/dpo", "grpo": "models/grpo", "evolve": "results.json"}
    return stage in left and exists(workdir / left[stage])


def run(settings: Settings, workdir: Path) -> None:
    """Run the stages that the settings name. The same again resumes, and a finished stage is not run again."""
    processes.alike("the configuration, or a version of what it runs with,", _started(settings, workdir))
    if processes.leads():
        _check_place(workdir)
    recorded = read_json(workdir / "config.json")
    if recorded is not None:
        _refuse_difference(workdir, recorded["config"], _configuration(settings), "another configuration")
    elif any(exists(workdir / name) for name in LEAVINGS):
        raise UserError(f"{workdir} holds a run without its config.json; use another workdir")
    for stage in settings.stages:
        if _finished(stage, workdir):
            print(f"{workdir} holds the finished {'run' if stage == 'evolve' else 'stage ' + stage}")
    todo = [stage for stage in settings.stages if stage != "report" and not _finished(stage, workdir)]
    if todo:
        lab = open_lab(settings)
        if "evolve" in todo:
            _check_scenarios(settings, lab)
        if {"pairs", "dpo", "grpo"} & set(todo):
            from atp_jax import alignment

            alignment.check_packs(settings, lab.wording)
        in_force, machine = _in_force(lab), _machine()
        if recorded is not None:
            _refuse_difference(workdir, recorded["in_force"], in_force, "other values in force")
            for name, value in machine.items():
                if recorded[name] != value:
                    print(f"note: the run was begun with {name} {recorded[name]}, now {value}")
        document = {"config": _configuration(settings), "in_force": in_force, **machine}
        with _workdir_for(workdir, document):
            # While the model was loaded another run may have begun here, and ended.
            there = read_json(workdir / "config.json")
            _refuse_difference(workdir, there["config"], document["config"], "another configuration")
            _refuse_difference(workdir, there["in_force"], in_force, "other values in force")
            for stage in todo:
                if _finished(stage, workdir):
                    continue
                if stage == "evolve":
                    evolve(settings, workdir, lab)
                else:
                    _align(stage, settings, workdir, lab)
    if "report" in settings.stages and processes.leads():
        report(settings, workdir)
