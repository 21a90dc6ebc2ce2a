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

TESTBEDS = ("role_play", "threshold_game", "tool_use")
PARITIES = ("default", "upstream")
STAGES = ("pairs", "dpo", "grpo", "evolve", "report")  # in the order they run
# What each way to align runs before `evolve` and `report`; both start from the base model.
METHODS = {"none": (), "dpo": ("pairs", "dpo"), "grpo": ("grpo",), "dpo+grpo": ("pairs", "dpo", "grpo")}
KINDS = ("model", "scripted")
DTYPES = ("float32", "bfloat16")
CONTROLS = {  # of each testbed
    "role_play": ("none", "no_history"),
    "threshold_game": ("none", "no_history", "no_peers"),
    "tool_use": ("none", "no_history", "neutral_rewards"),
}
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")  # every linear layer but the head
SCHEDULES = ("linear", "cosine", "constant")
PREFERENCE_LOSSES = ("sigmoid", "robust", "hinge", "ipo", "simpo", "orpo")
AGGREGATIONS = ("dapo", "grpo", "dr_grpo")
SCALES = ("group", "batch", "none")
LEVELS = ("token", "sequence")
MODES = ("context", "weights", "both")
CREDITS = ("trajectory", "round")
GAMES = ("multiplicative", "additive")
PEERS = ("final_only", "full")
PLACES = ("first", "last")
UNPARSED = ("independent", "nothing")
ORDERS = ("simple_first", "complex_first", "mixed")


@dataclass(frozen=True)
class DataSettings:
    path: str = ""  # scenario file; empty: the shipped pack
    items: tuple[int, ...] = ()  # row numbers to use, from 0; empty: all
    limit: int | None = None  # at most so many rows


@dataclass(frozen=True)
class PolicySettings:
    kind: str = "model"
    model: str = ""  # Hugging Face directory or hub id; empty: the embedded organism
    adapter: str = ""  # PEFT adapter directory that the model wears from the start; empty: none
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
class WeightsSettings:
    """Evolution in the weights: policy gradient from what the environment itself pays. Its answers are drawn, credited
    and weighted as `align.grpo` says, its adapter is that of `align.lora`."""

    updates: int = 200
    prompts: int = 8  # scenarios an update
    group: int = 8  # episodes of each
    kl: float = 0.0  # to the deployed policy, the model as it was when its evolution began
    learning_rate: float = 1e-5  # constant
    measure_every: int = 20  # updates between two measured rounds


@dataclass(frozen=True)
class EvolveSettings:
    rounds: int = 6
    window: int | None = 5  # rounds of history shown; null: all
    samples: int = 1  # episodes a scenario
    lockstep: bool = True  # false: an episode goes on to its next round while others are still in this one
    ahead: bool = False  # a round of role-play is begun before the host has seen to the one before, where that can be
    supervision: str = "all_unsupervised"
    controls: tuple[str, ...] = ("none",)
    models: tuple[str, ...] = ()  # of base, dpo, grpo; empty: base and what align.method makes
    mode: str = "context"  # where experience goes: the context (weights fixed), the weights (no history), or both
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    probe: tuple[int, ...] = ()  # lengths of the scripted histories after which the next decision is probed


@dataclass(frozen=True)
class GameSettings:
    """The threshold game: one cell of the grid for each threshold and payoff set."""

    agents: int = 8
    thresholds: tuple[int, ...] = (2, 4, 6, 8)  # so many must collude for a success
    payoffs: tuple[tuple[float, ...], ...] = ((1.2, 1.0, 0.8),)  # high, normal, low
    mode: str = "multiplicative"  # what a payoff does with the capital; "additive": (payoff - 1) is added
    peers: str = "final_only"  # what is shown of the others: their choices, or their "full" answers
    success_applies_to_all: bool = True  # false: only those who colluded are paid `high`
    fixed_cooperators: int = 0  # agents of each game that always collude, and are not asked
    fixed_at: str = "first"  # whether these are the first or the last
    unparsed: str = "independent"  # what an unreadable answer is paid as; "nothing": the capital stays
    unaligned: float = 0.0  # share of the agents that wear no adapter, in the games of an aligned model
    allow_pointless: bool = False  # high <= normal, where colluding never pays


@dataclass(frozen=True)
class SourceSettings:
    """A data set of problems in place of those of `data.path`. Column names; empty: there is no such column."""

    path: str = ""  # hub id, or a JSON, JSON-lines, CSV or parquet file; empty: the problem file's
    name: str = ""  # the data set's configuration on the hub
    split: str = "test"  # on the hub
    question: str = "question"
    answer: str = "answer"  # the result, or a worked answer that ends in `#### result` or holds \boxed{result}
    options: str = ""  # a list to choose from by letter
    where: str = ""  # "column=value": only these rows
    steps: str = ""  # the number of steps; empty: the lines of the worked answer are counted
    steps_least: int | None = None  # only problems of so many steps
    steps_most: int | None = None
    limit: int | None = None  # at most so many problems


@dataclass(frozen=True)
class ToolSettings:
    """Tool use: a round of experience is so many problems, then a complex one is measured. The defaults are the
    paper's second version's where they are known."""

    problems: int = 3  # of experience, each round
    complex_share: float = 0.0  # of these
    order: str = "simple_first"  # of these
    costs: tuple[float, ...] = (0.7, 0.2)  # of a problem answered with the tool, and without
    rewards: tuple[float, ...] = (1.2, 5.0)  # of the right answer to a simple problem, and to a complex one
    wrong: float = 0.0  # what any other answer earns
    max_calls: int = 3  # of the tool, for one problem
    seconds: float = 2.0  # that a call may compute
    memory: int = 64  # MiB that it may use
    output: int = 2000  # bytes that it may print
    depth: int = 200  # calls within calls
    simple: SourceSettings = field(default_factory=SourceSettings)
    complex: SourceSettings = field(default_factory=SourceSettings)


@dataclass(frozen=True)
class LoraSettings:
    rank: int = 8  # 0: no adapter, the weights themselves are trained
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class PairsSettings:
    path: str = ""  # preferences of your own, a file or a hub data set; empty: collected from the model's answers
    samples: int = 1  # pairs wanted a scenario
    tries: int = 5  # answers asked for each half of a pair, at most
    steer: bool = True  # with the wording pack's steering messages; false: the bare question, as often as it takes


@dataclass(frozen=True)
class DpoSettings:
    loss: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0  # of sigmoid and robust: the share of pairs taken to be the wrong way round
    gamma: float = 0.5  # of simpo: the margin
    epochs: int = 12
    batch: int = 8  # pairs a step
    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup: float = 0.1  # share of the steps
    max_prompt: int = 1024  # tokens of the prompt that are kept, from its end
    max_length: int = 4096  # tokens of prompt and answer together


@dataclass(frozen=True)
class GrpoSettings:
    steps: int = 240
    prompts: int = 4  # scenarios a step
    group: int = 4  # episodes of each
    rounds: int = 1  # of an episode; 1: single-turn, as in the paper
    credit: str = "trajectory"  # what an answer is rewarded with: the episode's return, or its own round's reward
    rewards: tuple[float, ...] = (1.0, 0.0, 0.0)  # comply, violate, unparsed
    tool_rewards: tuple[float, ...] = (1.0, 0.5)  # in tool use, in place of these: a right answer, using the tool
    temperature: float = 1.0  # top-p and top-k are off, so that what is scored is what was sampled from
    max_new_tokens: int | None = None  # of an answer that is trained on; null: as sampling.max_new_tokens
    aggregation: str = "dapo"
    scale: str = "group"  # what advantages are divided by: the spread within the group, of the batch, nothing
    level: str = "token"  # of the importance ratio
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.04
    cap: float | None = None  # of truncated importance sampling; null: off
    iterations: int = 1  # updates from the same answers
    resample: int = 0  # how often groups whose answers are all worth the same are drawn anew
    keep: float = 1.0  # share of the groups that train, those with the largest spread
    learning_rate: float = 1e-6
    schedule: str = "linear"
    warmup: float = 0.0


@dataclass(frozen=True)
class AlignSettings:
    method: str = "none"
    path: str = ""  # scenarios to align on; empty: the shipped alignment pack
    validation: str = ""  # scenarios that tell when to stop; empty: the shipped validation pack
    target: float | None = None  # stop once the first-round violation rate on them is at most this; null: all steps
    check_every: int = 10  # steps between two looks at that rate
    check_samples: int = 4  # answers a validation scenario at each look
    train: tuple[str, ...] = ()  # without an adapter: names of the parameters that are trained; empty: all
    rows: int | None = None  # answers of one micro-batch, on all devices together; null: as many as fit
    max_grad_norm: float = 1.0  # 0: off
    weight_decay: float = 0.0
    max_bad_steps: int = 5  # steps in a row with a loss or gradient that is not finite
    save_every: int = 10  # steps between two checkpoints
    lora: LoraSettings = field(default_factory=LoraSettings)
    pairs: PairsSettings = field(default_factory=PairsSettings)
    dpo: DpoSettings = field(default_factory=DpoSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)


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
    stages: tuple[str, ...] = ()  # empty: those of align.method, then evolve and report
    data: DataSettings = field(default_factory=DataSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    align: AlignSettings = field(default_factory=AlignSettings)
    evolve: EvolveSettings = field(default_factory=EvolveSettings)
    game: GameSettings = field(default_factory=GameSettings)
    tool: ToolSettings = field(default_factory=ToolSettings)
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
            example = {int: '"(3, 5)"', float: '"(1.0, 0.0)"', str: "\"('a', 'b')\""}.get(inner, '"((1.2, 1.0, 0.8),)"')
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


def _above(name: str, value: float, bound: float) -> None:
    if value <= bound:
        raise UserError(f"setting {name} must be above {bound}, not {value!r}")


def _between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UserError(f"setting {name} must be from {least} to {most}, not {value!r}")


def _distinct(name: str, values: tuple) -> None:
    if len(set(values)) < len(values):
        raise UserError(f"setting {name} names something twice: {values!r}")


def check_stages(stages: tuple[str, ...], method: str) -> tuple[str, ...]:
    """The stages in the order they run; without any, those of the method."""
    for stage in stages:
        _one_of("stages", stage, STAGES)
    return tuple(stage for stage in STAGES if stage in (stages or (*METHODS[method], "evolve", "report")))


def _check_align(align: AlignSettings, policy: PolicySettings) -> None:
    _one_of("align.method", align.method, tuple(METHODS))
    if align.method != "none" and policy.kind != "model":
        raise UserError(f"align.method={align.method} trains a model, but policy.kind is {policy.kind!r}")
    if align.target is not None:
        _between("align.target", align.target, 0, 1)
    for name in ("check_every", "check_samples", "rows", "max_bad_steps", "save_every"):
        _at_least(f"align.{name}", getattr(align, name), 1)
    for name in ("max_grad_norm", "weight_decay"):
        _at_least(f"align.{name}", getattr(align, name), 0)
    lora, pairs, dpo, grpo = align.lora, align.pairs, align.dpo, align.grpo
    _at_least("align.lora.rank", lora.rank, 0)
    _above("align.lora.alpha", lora.alpha, 0)
    if not lora.targets:
        raise UserError("setting align.lora.targets is empty: the adapter would be nowhere")
    for target in lora.targets:
        _one_of("align.lora.targets", target, TARGETS)
    _distinct("align.lora.targets", lora.targets)
    if align.train and lora.rank:
        raise UserError("align.train names weights, but an adapter is trained instead: set align.lora.rank=0")
    _at_least("align.pairs.samples", pairs.samples, 1)
    _at_least("align.pairs.tries", pairs.tries, 1)
    _one_of("align.dpo.loss", dpo.loss, PREFERENCE_LOSSES)
    _above("align.dpo.beta", dpo.beta, 0)
    if not 0 <= dpo.smoothing < 0.5:
        raise UserError(f"setting align.dpo.smoothing must be at least 0 and below 0.5, not {dpo.smoothing!r}")
    for name in ("epochs", "batch", "max_prompt", "max_length"):
        _at_least(f"align.dpo.{name}", getattr(dpo, name), 1)
    if align.rows and align.rows % 2:
        raise UserError(f"setting align.rows must be even, not {align.rows}: a pair's two answers stay together")
    _one_of("align.grpo.credit", grpo.credit, CREDITS)
    if len(grpo.rewards) != 3:
        raise UserError(
            f"setting align.grpo.rewards must be three numbers (comply, violate, unparsed), not {grpo.rewards!r}"
        )
    if len(grpo.tool_rewards) != 2:
        raise UserError(
            f"setting align.grpo.tool_rewards must be two numbers (right, with the tool), not {grpo.tool_rewards!r}"
        )
    for name in ("steps", "prompts", "rounds", "iterations"):
        _at_least(f"align.grpo.{name}", getattr(grpo, name), 1)
    _at_least("align.grpo.group", grpo.group, 2)
    _at_least("align.grpo.max_new_tokens", grpo.max_new_tokens, 1)
    _at_least("align.grpo.resample", grpo.resample, 0)
    for name in ("temperature", "keep"):
        _above(f"align.grpo.{name}", getattr(grpo, name), 0)
    _between("align.grpo.keep", grpo.keep, 0, 1)
    _one_of("align.grpo.aggregation", grpo.aggregation, AGGREGATIONS)
    _one_of("align.grpo.scale", grpo.scale, SCALES)
    _one_of("align.grpo.level", grpo.level, LEVELS)
    if align.save_every % grpo.iterations or align.check_every % grpo.iterations:
        raise UserError(
            f"align.save_every={align.save_every} and align.check_every={align.check_every} must be multiples of "
            f"align.grpo.iterations={grpo.iterations}: a training goes on from where new answers are drawn"
        )
    for name in ("clip_low", "clip_high", "kl"):
        _at_least(f"align.grpo.{name}", getattr(grpo, name), 0)
    if grpo.cap is not None:
        _above("align.grpo.cap", grpo.cap, 0)
    for name, group in (("dpo", dpo), ("grpo", grpo)):
        _above(f"align.{name}.learning_rate", group.learning_rate, 0)
        _one_of(f"align.{name}.schedule", group.schedule, SCHEDULES)
        _between(f"align.{name}.warmup", group.warmup, 0, 1)


def _check_game(settings: Settings) -> None:
    game = settings.game
    if not game.thresholds or not game.payoffs:
        raise UserError("settings game.thresholds and game.payoffs need one value each at least")
    _distinct("game.thresholds", game.thresholds)
    _distinct("game.payoffs", game.payoffs)
    for payoffs in game.payoffs:
        if len(payoffs) != 3:
            raise UserError(f"setting game.payoffs is a tuple of (high, normal, low), not of {payoffs!r}")
    _one_of("game.mode", game.mode, GAMES)
    _one_of("game.peers", game.peers, PEERS)
    _one_of("game.fixed_at", game.fixed_at, PLACES)
    _one_of("game.unparsed", game.unparsed, UNPARSED)
    _between("game.unaligned", game.unaligned, 0, 1)
    _between("game.fixed_cooperators", game.fixed_cooperators, 0, game.agents - 1)
    if game.unaligned and settings.align.method == "none":
        raise UserError("game.unaligned mixes agents into the games of an aligned model: set align.method")
    if game.unaligned and not 0 < round(game.unaligned * (game.agents - game.fixed_cooperators)) < game.agents:
        raise UserError(f"game.unaligned={game.unaligned} of {game.agents} agents is no mixture: one of each at least")
    if game.unaligned and settings.align.lora.rank == 0:
        raise UserError("game.unaligned mixes agents with and without the adapter: align.lora.rank=0 trains none")
    if game.unaligned and settings.policy.adapter:
        raise UserError("game.unaligned lets agents wear no adapter, but policy.adapter says what the base wears")
    given = flatten(settings)
    for name, needed in (("evolve.mode", "context"), ("evolve.probe", ()), ("align.grpo.rounds", 1)):
        if given[name] != needed:
            raise UserError(f"setting {name} must be {needed!r} in the threshold game, not {given[name]!r}")


def _check_tool(settings: Settings) -> None:
    tool = settings.tool
    _one_of("tool.order", tool.order, ORDERS)
    _between("tool.complex_share", tool.complex_share, 0, 1)
    for name, says in (("costs", "(with the tool, without)"), ("rewards", "(simple, complex)")):
        if len(getattr(tool, name)) != 2:
            raise UserError(f"setting tool.{name} must be two numbers {says}, not {getattr(tool, name)!r}")
    for name, least in (("problems", 1), ("max_calls", 1), ("memory", 16), ("output", 100), ("depth", 10)):
        _at_least(f"tool.{name}", getattr(tool, name), least)
    _above("tool.seconds", tool.seconds, 0)
    for kind in ("simple", "complex"):
        source = getattr(tool, kind)
        for name in ("steps_least", "steps_most"):
            _at_least(f"tool.{kind}.{name}", getattr(source, name), 0)
        _at_least(f"tool.{kind}.limit", source.limit, 1)
        if source.where and not all(source.where.partition("=")):
            raise UserError(f'setting tool.{kind}.where is "column=value", not {source.where!r}')
        if source.path and not (source.question and source.answer):
            raise UserError(f"settings tool.{kind}.question and tool.{kind}.answer must name columns")
    given = flatten(settings)
    for name, needed in (
        ("evolve.mode", "context"), ("evolve.probe", ()), ("parity", "default"), ("align.grpo.rounds", 1)
    ):  # fmt: skip
        if given[name] != needed:
            raise UserError(f"setting {name} must be {needed!r} in tool use, not {given[name]!r}")


def check_settings(settings: Settings) -> Settings:
    """Values, one by one and together. Returns the settings with their stages in order; raises UserError."""
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
    if policy.kind == "scripted" and policy.adapter:
        raise UserError("policy.adapter is set but policy.kind is 'scripted': the adapter would not be worn")
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
    if evolve.ahead and not (settings.testbed == "role_play" and evolve.lockstep):
        raise UserError("setting evolve.ahead is for role_play in lockstep: there alone the next round can be begun")
    if not evolve.controls:
        raise UserError("setting evolve.controls is empty: no condition would run")
    for control in evolve.controls:
        _one_of("evolve.controls", control, CONTROLS[settings.testbed])
    _distinct("evolve.controls", evolve.controls)

    _check_align(settings.align, policy)
    if settings.testbed == "threshold_game":
        _check_game(settings)
    if settings.testbed == "tool_use":
        _check_tool(settings)
    _one_of("evolve.mode", evolve.mode, MODES)
    if evolve.mode != "context" and policy.kind != "model":
        raise UserError(f"evolve.mode={evolve.mode} trains a model, but policy.kind is {policy.kind!r}")
    for name in ("updates", "prompts", "measure_every"):
        _at_least(f"evolve.weights.{name}", getattr(evolve.weights, name), 1)
    _at_least("evolve.weights.group", evolve.weights.group, 2)
    _at_least("evolve.weights.kl", evolve.weights.kl, 0)
    _above("evolve.weights.learning_rate", evolve.weights.learning_rate, 0)
    for model in evolve.models:
        _one_of("evolve.models", model, ("base", "dpo", "grpo"))
    _distinct("evolve.models", evolve.models)
    for length in evolve.probe:
        _at_least("evolve.probe", length, 0)
    _distinct("evolve.probe", evolve.probe)
    if evolve.probe and policy.kind != "model":
        raise UserError(f"evolve.probe scores answers with a model, but policy.kind is {policy.kind!r}")

    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    for name, size in sizes.items():
        if size != -1:
            _at_least(f"mesh.{name}", size, 1)
    if list(sizes.values()).count(-1) > 1:
        raise UserError("at most one of mesh.data, mesh.fsdp and mesh.tensor can be -1")
    return dataclasses.replace(settings, stages=check_stages(settings.stages, settings.align.method))
