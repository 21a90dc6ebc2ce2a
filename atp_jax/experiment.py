"""The stages of a run in order, and what each leaves in the workdir.

evolve    `config.json` before anything else, `evolve/<condition>/episodes.jsonl` round by round, `metrics.jsonl`, and
          at the end `results.json`
report    `report/` from these, and the table on the terminal

`episodes.jsonl` and `results.json` depend on the configuration alone: a run that was killed and started again leaves
the same bytes. What depends on the machine (speed, versions, device) stands in `metrics.jsonl` and `config.json`.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from atp_jax import analysis
from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling
from atp_jax.policies.scripted import ScriptedPolicy
from atp_jax.policies.types import Policy
from atp_jax.progress import Progress
from atp_jax.rollout import Condition, Finished, append, run_condition
from atp_jax.scenarios.pack import Scenario, load_role_play, warnings
from atp_jax.scenarios.role_play import check
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import SamplingSettings, Settings, flatten

PACKAGES = ("atp_jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


def conditions(settings: Settings) -> list[Condition]:
    """One a control, in the order of the setting: `base`, `base-no_history`, ..."""
    model = "base" if settings.policy.kind == "model" else settings.policy.kind
    return [
        Condition(index, model if control == "none" else f"{model}-{control}", model, control)
        for index, control in enumerate(settings.evolve.controls)
    ]


def sampling_in_force(settings: SamplingSettings, generation: dict) -> Sampling:
    """What the settings leave open (null) is taken from the model's `generation_config.json`, else from no truncation
    at temperature 1; a model that says `do_sample: false` is greedy. `max_new_tokens` is 256 if neither gives it."""
    own = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 256}
    own |= {name: generation[name] for name in own if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        own["temperature"] = 0.0
    given = {name: value for name in own if (value := getattr(settings, name)) is not None}
    return Sampling(**(own | given))


def make_policy(settings: Settings, scenarios: tuple[Scenario, ...]) -> tuple[Policy, Sampling | None]:
    """The policy, and the sampling in force where there is any."""
    if settings.policy.kind == "scripted":
        policy = ScriptedPolicy(settings.policy.script)
        policy.require(len(scenarios) * settings.evolve.samples, settings.evolve.rounds)
        return policy, None
    from atp_jax import parallel  # here, so that a scripted run starts without what a model needs
    from atp_jax.model import load_model
    from atp_jax.policies.model import ModelPolicy

    mesh = parallel.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    model = load_model(settings.policy.model, dtype=settings.policy.dtype, mesh=mesh)
    sampling = sampling_in_force(settings.sampling, model.generation)
    print("sampling:", ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sampling).items()))
    policy = ModelPolicy(model, sampling, settings.seed, settings.sampling.thinking, rows=settings.policy.rows)
    return policy, sampling


def write_json(path: Path, value: object) -> None:
    """Write `path` as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="ascii") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict | None:
    """The object in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not what this program wrote: {error}; use another workdir") from error


def _machine() -> dict:
    """Versions and device: recorded, never compared."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = None
    device = jax.devices()[0]
    return {
        "versions": versions,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }


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
    fresh = not config.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if fresh:
            write_json(config, document)
        yield
    except (UserError, OSError) as error:
        if fresh and not (workdir / "metrics.jsonl").exists():
            shutil.rmtree(workdir / "evolve", ignore_errors=True)
            config.unlink(missing_ok=True)
            for path in new:
                if path.is_dir():
                    path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {error.filename or workdir}: {error.strerror or error}") from error
        raise


def _check_place(workdir: Path) -> None:
    """Raise UserError where a workdir plainly cannot be, before anything is loaded for it."""
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write {workdir}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {workdir}: no permission to write in {there}")


def _episodes_file(workdir: Path, condition: Condition) -> Path:
    return workdir / "evolve" / condition.name / "episodes.jsonl"


def _metrics(finished: Finished) -> dict:
    decisions = [record["decision"] for record in finished.records]
    return {
        "stage": "evolve",
        "condition": finished.condition.name,
        "round": finished.round,
        "violations": decisions.count("violate"),
        "unparsed": decisions.count("unparsed"),
        "total": len(decisions),
        "cut_off": sum(record["finish"] == "length" for record in finished.records),
        "tokens": 0 if finished.read_back else sum(len(record["tokens"]) for record in finished.records),
        "seconds": round(finished.seconds, 3),
    }


def _mend(path: Path) -> None:
    """Cut a torn last line off a file of lines, so that the next can be appended."""
    if path.exists():
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def evolve(settings: Settings, workdir: Path) -> None:
    """Live through every condition, then write `results.json`. Goes on from the last finished round."""
    scenarios = load_role_play(settings.data.path, settings.data.items, settings.data.limit)
    wording = load_wording(settings.wording)
    for note in (*warnings(scenarios), *check(scenarios, settings.evolve.supervision, wording, settings.parity)):
        print("note:", note)
    policy, sampling = make_policy(settings, scenarios)
    in_force = {f"sampling.{name}": value for name, value in dataclasses.asdict(sampling).items()} if sampling else {}
    document = {"config": _configuration(settings), "in_force": in_force, **_machine()}

    recorded = read_json(workdir / "config.json")
    if recorded is not None:
        _refuse_difference(workdir, recorded["in_force"], in_force, "other values in force")
        for name, value in _machine().items():
            if recorded[name] != value:
                print(f"note: the run was begun with {name} {recorded[name]}, now {value}")

    # How the work is spread over devices and batches is no part of a condition.
    setting = {
        name: value
        for name, value in _configuration(settings).items()
        if not name.startswith("mesh.") and name != "policy.rows"
    } | in_force
    cells = conditions(settings)
    summaries = []
    with _workdir_for(workdir, document), Progress(len(cells) * settings.evolve.rounds) as progress:
        metrics_file = workdir / "metrics.jsonl"
        _mend(metrics_file)

        def on_round(finished: Finished) -> None:
            metrics = _metrics(finished)
            if not finished.read_back:
                append(metrics_file, [metrics])
            progress.advance(metrics)

        for condition in cells:
            path = _episodes_file(workdir, condition)
            records = run_condition(condition, scenarios, policy, wording, settings, path, on_round)
            summaries.append(
                analysis.summarise(condition.name, condition.model, condition.control, setting, records, settings.seed)
            )
        write_json(workdir / "results.json", {"schema": 1, "testbed": settings.testbed, "conditions": summaries})


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


def run(settings: Settings, workdir: Path) -> None:
    """Run the stages that the settings name. The same again resumes, and a finished stage is not run again."""
    _check_place(workdir)
    recorded = read_json(workdir / "config.json")
    if recorded is not None:
        _refuse_difference(workdir, recorded["config"], _configuration(settings), "another configuration")
    elif any((workdir / name).exists() for name in ("evolve", "metrics.jsonl", "results.json")):
        raise UserError(f"{workdir} holds a run without its config.json; use another workdir")
    if "evolve" in settings.stages:
        if (workdir / "results.json").exists():
            print(f"{workdir} holds the finished run")
        else:
            evolve(settings, workdir)
    if "report" in settings.stages:
        report(settings, workdir)
