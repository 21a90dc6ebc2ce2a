"""The settings of a run: frozen dataclasses made from a config, and every check of a setting.

A config file has `get_config(arg="")` that returns an `ml_collections.ConfigDict`; it usually starts from
`default_config()` and may as well name only what it changes. What a setting means stands beside it below.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from atp_jax.envs.role_play import PATTERNS
from atp_jax.errors import UserError

TESTBEDS = ("role_play",)
PARITIES = ("default", "upstream")
STAGES = ("evolve", "report")  # in the order they run
KINDS = ("model", "scripted")
DTYPES = ("float32", "bfloat16")
CONTROLS = ("none", "no_history")


@dataclass(frozen=True)
class DataSettings:
    path: str = ""  # scenario file; empty: the shipped pack
    items: tuple[int, ...] = ()  # row numbers to use, from 0; empty: all
    limit: int | None = None  # at most so many rows


@dataclass(frozen=True)
class PolicySettings:
    kind: str = "model"
    model: str = ""  # Hugging Face directory or hub id; empty: the embedded organism
    dtype: str = "float32"
    script: str = ""  # answers of the scripted policy, JSON lines
    rows: int | None = None  # at most so many rows decoded together; null: all


@dataclass(frozen=True)
class SamplingSettings:
    """Null: as the model's `generation_config.json` says."""

    temperature: float | None = None  # 0: greedy
    top_p: float | None = None
    top_k: int | None = None  # 0: off
    max_new_tokens: int | None = None
    thinking: bool | None = None  # null: as the chat template does by itself


@dataclass(frozen=True)
class EvolveSettings:
    rounds: int = 6
    window: int | None = 5  # rounds of history shown; null: all
    samples: int = 1  # episodes a scenario
    supervision: str = "all_unsupervised"
    controls: tuple[str, ...] = ("none",)


@dataclass(frozen=True)
class MeshSettings:
    """Sizes of the axes of the device mesh; -1 (at most once): what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Settings:
    testbed: str = "role_play"
    seed: int = 0
    parity: str = "default"
    wording: str = ""  # path of a wording pack; empty: the project's own
    stages: tuple[str, ...] = STAGES
    data: DataSettings = field(default_factory=DataSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evolve: EvolveSettings = field(default_factory=EvolveSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)


# ConfigDict checks assignments by type. An optional number takes either kind of number, or None.
_FIELD_TYPES = {int | None: int | None, float | None: int | float | None, bool | None: bool | None}


def to_config(settings: Settings) -> ConfigDict:
    """The settings as a ConfigDict whose every field knows its type, so that any of them can be overridden."""

    def group(values) -> ConfigDict:
        config = ConfigDict()
        kinds = typing.get_type_hints(type(values))
        for name, value in ((f.name, getattr(values, f.name)) for f in dataclasses.fields(values)):
            if dataclasses.is_dataclass(value):
                config[name] = group(value)
            elif kinds[name] in _FIELD_TYPES:
                config[name] = FieldReference(value, field_type=_FIELD_TYPES[kinds[name]])
            else:
                config[name] = value
        return config

    return group(settings)


def default_config() -> ConfigDict:
    """Every setting with its default value, for config files to start from."""
    return to_config(Settings())


def flatten(settings: Settings) -> dict[str, object]:
    """`{"evolve.rounds": 6, ...}`, in the order of the definitions."""
    return dict(_flat(dataclasses.asdict(settings)))


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_name(name: str) -> None:
    """Raise UserError, with the nearest known name, unless `name` (dotted) is a setting."""
    known = list(flatten(Settings()))
    if name in known:
        return
    if any(other.startswith(name + ".") for other in known):
        raise UserError(f"setting {name} is a group: set its members one by one, as in {name}.NAME")
    # The last part weighs more than the group: `rounds` should find `evolve.rounds`.
    last = {other.rsplit(".", 1)[-1]: other for other in known}
    near = difflib.get_close_matches(name, known, n=1) or [
        last[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1)
    ]
    raise UserError(f"unknown setting {name}" + (f"; the nearest is {near[0]}" if near else ""))


_SAID = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _typed(name: str, value: object, kind: object) -> object:
    """`value` as `kind` (a type annotation of a field above), or UserError."""
    if isinstance(kind, types.UnionType):  # X | None
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
        if value is None:
            return None
    if typing.get_origin(kind) is tuple:
        (inner, _) = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            example = '"(3, 5)"' if inner is int else "\"('a', 'b')\""
            raise UserError(f"setting {name} must be a tuple such as {example}, not {value!r}")
        return tuple(_typed(name, item, inner) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"setting {name} must be {_SAID[kind]}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"setting {name} must be a finite number, not {value!r}")
    return value


def read_settings(config: Mapping) -> Settings:
    """Names and types: a config (all or a part of the settings) as `Settings`. UserError names what does not fit."""
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"a config must be a ConfigDict, not {type(config).__name__}")

    def group(kind: type, values: Mapping, prefix: str):
        kinds = typing.get_type_hints(kind)
        given = {}
        for name, value in values.items():
            path = f"{prefix}{name}"
            if name in kinds and dataclasses.is_dataclass(kinds[name]):
                if not isinstance(value, Mapping | ConfigDict):
                    raise UserError(f"setting {path} is a group of settings, not {value!r}")
                given[name] = group(kinds[name], value, path + ".")
            else:
                check_name(path)
                given[name] = _typed(path, value, kinds[name])
        return kind(**given)

    return group(Settings, config, "")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"setting {name} must be one of {', '.join(choices)}, not {value!r}")


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise UserError(f"setting {name} must be at least {least}, not {value!r}")


def _distinct(name: str, values: tuple) -> None:
    if len(set(values)) < len(values):
        raise UserError(f"setting {name} names something twice: {values!r}")


def check_stages(stages: tuple[str, ...]) -> tuple[str, ...]:
    """The stages in the order they run."""
    if not stages:
        raise UserError("setting stages is empty: nothing would be done")
    for stage in stages:
        if stage in ("pairs", "dpo", "grpo"):
            raise UserError(f"stage {stage} is not there yet; there are {', '.join(STAGES)}")
        _one_of("stages", stage, STAGES)
    return tuple(stage for stage in STAGES if stage in stages)


def check_settings(settings: Settings) -> Settings:
    """Values, one by one and together. Returns the settings with their stages in order; raises UserError."""
    if settings.testbed in ("threshold_game", "tool_use"):
        raise UserError(f"testbed {settings.testbed} is not there yet; there is {', '.join(TESTBEDS)}")
    _one_of("testbed", settings.testbed, TESTBEDS)
    _one_of("parity", settings.parity, PARITIES)
    if not 0 <= settings.seed < 2**31:
        raise UserError(f"setting seed must be from 0 to 2147483647, not {settings.seed}")
    if settings.parity == "upstream" and not settings.wording:
        raise UserError("parity=upstream shows the original's messages: set wording to the path of its wording pack")

    data, policy, sampling, evolve, mesh = (
        settings.data,
        settings.policy,
        settings.sampling,
        settings.evolve,
        settings.mesh,
    )
    for item in data.items:
        _at_least("data.items", item, 0)
    _distinct("data.items", data.items)
    _at_least("data.limit", data.limit, 1)

    _one_of("policy.kind", policy.kind, KINDS)
    _one_of("policy.dtype", policy.dtype, DTYPES)
    _at_least("policy.rows", policy.rows, 1)
    if policy.kind == "scripted" and not policy.script:
        raise UserError("policy.kind=scripted reads its answers from a file: set policy.script to its path")
    if policy.kind != "scripted" and policy.script:
        raise UserError(f"policy.script is set but policy.kind is {policy.kind!r}: the script would not be read")

    _at_least("sampling.temperature", sampling.temperature, 0)
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise UserError(f"setting sampling.top_p must be above 0 and at most 1, not {sampling.top_p!r}")
    _at_least("sampling.top_k", sampling.top_k, 0)
    _at_least("sampling.max_new_tokens", sampling.max_new_tokens, 1)

    _at_least("evolve.rounds", evolve.rounds, 1)
    _at_least("evolve.window", evolve.window, 0)
    _at_least("evolve.samples", evolve.samples, 1)
    _one_of("evolve.supervision", evolve.supervision, PATTERNS)
    if not evolve.controls:
        raise UserError("setting evolve.controls is empty: no condition would run")
    for control in evolve.controls:
        _one_of("evolve.controls", control, CONTROLS)
    _distinct("evolve.controls", evolve.controls)

    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    for name, size in sizes.items():
        if size != -1:
            _at_least(f"mesh.{name}", size, 1)
    if list(sizes.values()).count(-1) > 1:
        raise UserError("at most one of mesh.data, mesh.fsdp and mesh.tensor can be -1")
    return dataclasses.replace(settings, stages=check_stages(settings.stages))
