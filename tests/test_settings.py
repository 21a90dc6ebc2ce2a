"""Settings: what is accepted comes through unchanged, what is not is one line that names it."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from atp_jax import settings as s
from atp_jax.errors import UserError


def values(kind):
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values(hint) for name, hint in hints.items()})
    simple = {
        str: st.text(max_size=5),
        int: st.integers(-5, 2**40),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }
    if kind in simple:
        return simple[kind]
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    return st.none() | simple[arguments[0]]


RUN = ("evolve", "report")


@given(values(s.Settings))
def test_settings_survive_the_config_dict(settings):
    assert s.read_settings(s.to_config(settings)) == settings


def test_the_defaults_are_good_settings():
    checked = s.check_settings(s.read_settings(s.default_config()))
    assert checked == dataclasses.replace(s.Settings(), stages=("evolve", "report"))
    assert s.read_settings(ConfigDict()) == s.Settings()


def test_a_config_may_name_only_what_it_changes():
    config = ConfigDict({"evolve": {"rounds": 2, "controls": ["no_history"]}, "sampling": {"temperature": 1}})
    read = s.read_settings(config)
    assert read.evolve == s.EvolveSettings(rounds=2, controls=("no_history",))
    assert read.sampling.temperature == 1.0 and isinstance(read.sampling.temperature, float)
    assert read.data == s.DataSettings()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("evolve.round", "evolve.rounds"),
        ("rounds", "evolve.rounds"),
        ("temprature", "sampling.temperature"),
        ("policy.modle", "policy.model"),
        ("evolve.rounds.more", "evolve.rounds"),
    ],
)
def test_an_unknown_setting_is_told_the_nearest(name, nearest):
    config = {}
    *groups, last = name.split(".")
    inner = config
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = 1
    with pytest.raises(UserError) as caught:
        s.read_settings(ConfigDict(config))
    if len(groups) < 2:
        assert f"unknown setting {name}; the nearest is {nearest}" == str(caught.value)
    with pytest.raises(UserError, match=f"unknown setting {name}; the nearest is {nearest}"):
        s.check_name(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "0"),
        ("seed", 1.0),
        ("seed", True),
        ("seed", None),
        ("wording", 3),
        ("data.items", "3"),
        ("data.items", (1.5,)),
        ("data.items", (True,)),
        ("evolve.controls", (1,)),
        ("sampling.temperature", float("nan")),
        ("sampling.top_p", float("inf")),
        ("sampling.thinking", 1),
        ("sampling.max_new_tokens", 3.0),
        ("evolve", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_named(name, value):
    *group, last = name.split(".")
    config = {group[0]: {last: value}} if group else {last: value}
    with pytest.raises(UserError, match=f"setting {name} "):
        s.read_settings(config)


def changed(name: str, value) -> s.Settings:
    def within(settings, path):
        first, *rest = path
        return dataclasses.replace(settings, **{first: within(getattr(settings, first), rest) if rest else value})

    return within(s.Settings(), name.split("."))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("testbed", "tool_user"),
        ("testbed", "chess"),
        ("seed", -1),
        ("seed", 2**31),
        ("parity", "exact"),
        ("parity", "upstream"),  # without a wording pack
        ("stages", ("evolv",)),
        ("data.items", (0, -1)),
        ("data.items", (3, 3)),
        ("data.limit", 0),
        ("policy.kind", "remote"),
        ("policy.kind", "scripted"),  # without a script
        ("policy.script", "answers.jsonl"),  # with a model
        ("policy.dtype", "float16"),
        ("policy.rows", 0),
        ("sampling.temperature", -0.1),
        ("sampling.top_p", 0.0),
        ("sampling.top_p", 1.01),
        ("sampling.top_k", -1),
        ("sampling.max_new_tokens", 0),
        ("evolve.rounds", 0),
        ("evolve.window", -1),
        ("evolve.samples", 0),
        ("evolve.supervision", "sometimes"),
        ("evolve.controls", ()),
        ("evolve.controls", ("none", "none")),
        ("evolve.controls", ("no_hope",)),
        ("evolve.mode", "body"),
        ("evolve.models", ("base", "ppo")),
        ("evolve.models", ("base", "base")),
        ("evolve.probe", (1, -1)),
        ("evolve.weights.updates", 0),
        ("evolve.weights.group", 1),
        ("evolve.weights.kl", -0.1),
        ("evolve.weights.learning_rate", 0.0),
        ("align.method", "ppo"),
        ("align.target", 1.1),
        ("align.check_every", 0),
        ("align.rows", 3),
        ("align.max_grad_norm", -1.0),
        ("align.train", ("layers",)),  # with an adapter
        ("align.lora.rank", -1),
        ("align.lora.alpha", 0.0),
        ("align.lora.targets", ()),
        ("align.lora.targets", ("head",)),
        ("align.pairs.tries", 0),
        ("align.dpo.loss", "kto"),
        ("align.dpo.beta", 0.0),
        ("align.dpo.smoothing", 0.5),
        ("align.dpo.schedule", "step"),
        ("align.dpo.warmup", 1.5),
        ("align.grpo.group", 1),
        ("align.grpo.rewards", (1.0, 0.0)),
        ("align.grpo.aggregation", "mean"),
        ("align.grpo.keep", 0.0),
        ("align.grpo.cap", 0.0),
        ("align.grpo.iterations", 3),  # does not divide align.save_every
        ("mesh.data", 0),
        ("mesh.tensor", -2),
        ("mesh.fsdp", -1),  # mesh.data is -1 already
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UserError) as caught:
        s.check_settings(changed(name, value))
    assert name.split(".")[-1].removesuffix("s") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2**31 - 1), ("evolve.window", None), ("evolve.window", 0), ("sampling.temperature", 0.0),
     ("sampling.top_p", 1.0), ("sampling.top_k", 0), ("data.items", (5, 3)), ("mesh.data", 4)],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_good(name, value):
    assert s.check_settings(changed(name, value)) == dataclasses.replace(changed(name, value), stages=RUN)


def test_stages_run_in_their_order():
    assert s.check_settings(changed("stages", ("report", "evolve"))).stages == RUN


@pytest.mark.parametrize(
    ("method", "before"),
    [("none", ()), ("dpo", ("pairs", "dpo")), ("grpo", ("grpo",)), ("dpo+grpo", ("pairs", "dpo", "grpo"))],
)
def test_without_stages_the_method_says_which(method, before):
    assert s.check_settings(changed("align.method", method)).stages == before + RUN
