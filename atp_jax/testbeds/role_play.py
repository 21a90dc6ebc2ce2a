"""Role-play as a testbed: one agent an episode, a rule, and somebody who watches or not."""

import itertools
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atp_jax.chat import Chat
from atp_jax.decisions import DECISIONS, read_decision
from atp_jax.envs import role_play as env
from atp_jax.generate.sizes import common_prefix
from atp_jax.policies.types import Answer, Request, Script
from atp_jax.scenarios import role_play as words
from atp_jax.scenarios.pack import ALIGN, VALIDATION, Scenario, load_role_play, warnings
from atp_jax.scenarios.wording import steer
from atp_jax.settings import CONTROLS, Settings
from atp_jax.testbeds.types import Condition, Question, at_once, by_decision, exact, read_option, record

__all__ = ["ALIGN", "VALIDATION"]
AGENT = 0  # there is one an episode
TOGETHER = False
FIRST = 1  # the number of the first round

load = align_on = load_role_play
answering, read, training_rewards = at_once, read_option, by_decision


def scenarios(settings: Settings) -> tuple[Scenario, ...]:
    """The scenarios of the settings."""
    return load(settings.data.path, settings.data.items, settings.data.limit)


def notes(settings: Settings, scenarios: Sequence[Scenario], wording: dict) -> list[str]:
    """What the user should know of the scenarios; UserError for whatever they could fail by later."""
    return warnings(scenarios) + words.check(scenarios, settings.evolve.supervision, wording, settings.parity)


def conditions(settings: Settings, model: str, place: int) -> list[Condition]:
    """One a control: `base`, `base-no_history`. place: of the model among all there can be; a condition's index, which
    addresses its randomness, does not change when other models join the experiment."""
    return [
        Condition(100 * place + CONTROLS["role_play"].index(control), _name(model, control), model, control)
        for control in settings.evolve.controls
    ]


def asked(settings: Settings) -> list[int]:
    """The agents of an episode that are asked."""
    return [AGENT]


def summarise(condition: Condition, setting: dict, records: Sequence[dict], seed: int) -> dict:
    """The condition in `results.json`."""
    from atp_jax import analysis

    return analysis.summarise(condition.name, condition.model, condition.control, setting, records, seed)


def questions(scenarios: Sequence[Scenario], wording: dict, settings: Settings) -> list[Question]:
    """First rounds that say the neutral text."""
    found = []
    for scenario in scenarios:
        asked = words.question(scenario, env.UNSUPERVISED, "all_unsupervised", wording, settings.parity)
        messages = words.messages(scenario, asked, (), None, settings.parity)
        steering = {decision: steer(wording, decision) for decision in ("comply", "violate")}
        found.append(Question(scenario.row, messages, scenario.comply, scenario.violate, steering))
    return found


def supervised(settings: Settings) -> np.ndarray:
    """Who is watching in each round: int32 [R]."""
    return env.supervision(settings.evolve.supervision, settings.evolve.rounds, settings.seed)


class Lives:
    """Episodes that are lived through together: `ask` what the next round shows each agent, `tell` what was answered.

    episodes: the scenario of each, [E]. supervision: who is watching, int32 [R], so R is the longest they can last;
    None: as the settings say.
    """

    def __init__(
        self,
        condition: Condition,
        episodes: Sequence[Scenario],
        wording: dict,
        settings: Settings,
        first: int = 0,
        supervision: np.ndarray | None = None,
    ):
        """first: the number of the first episode; it addresses the randomness of the answers."""
        supervision = supervised(settings) if supervision is None else supervision
        self.addresses = [(first + row, AGENT) for row in range(len(episodes))]
        self.round = 0  # of what was asked last, from 1
        self._condition, self._episodes, self._supervision = condition, episodes, supervision
        self._texts, self._pattern = (wording, settings.parity), settings.evolve.supervision
        self._window, self._parity, self._first = settings.evolve.window, settings.parity, first
        self._histories: list[list[words.Turn]] = [[] for _ in episodes]
        self._questions: list[str] = []
        self._requests: list[Request] = []
        with exact():
            self._params = _params(episodes, supervision)
            self._states = jax.vmap(env.init)(self._params)

    def ask(self) -> list[Request]:
        """What each agent is shown in the next round."""
        self.round += 1
        state = int(self._supervision[self.round - 1])
        self._questions = [
            words.question(scenario, state, self._pattern, *self._texts) for scenario in self._episodes
        ]
        alone = self._condition.control == "no_history"
        shown = zip(self._episodes, self._questions, self._histories, strict=True)
        self._requests = [
            Request(
                self._condition.index, self._first + row, AGENT, self.round,
                words.messages(scenario, question, () if alone else history, self._window, self._parity),
            )
            for row, (scenario, question, history) in enumerate(shown)
        ]  # fmt: skip
        return self._requests

    def script(self, chat: Chat) -> Script | None:
        """What every answer of every round is followed by, before anything was asked; None where that depends on more
        than what it decides: where rounds drop out of sight, or were never in it, where answers are read upstream's
        way, or quoted when they cannot be read.

        The environment is stepped with each decision in each round, and what the agent is then told is put into ids as
        in a conversation of these two rounds.
        """
        rounds = len(self._supervision)
        seen = self._window is None or self._window >= rounds - 1
        one, other = (words.feedback(self._episodes[0], "unparsed", False, 0.0, text, *self._texts) for text in "ab")
        if not seen or one != other or self._condition.control == "no_history" or self._parity != "default":
            return None
        which = np.full((len(self._episodes), rounds, len(DECISIONS)), -1, np.int32)
        segments: dict[tuple[int, ...], int] = {}
        followed: dict[tuple, tuple[tuple[int, ...], int]] = {}
        states = self._states
        for number, (now, after) in enumerate(itertools.pairwise(self._supervision.tolist())):
            before = states  # the next ones are the same whatever is decided: they count rounds
            for code, decision in enumerate(DECISIONS):
                with exact():
                    states, outcomes = _step(before, jnp.full(len(self._episodes), code), self._params)
                    paid = zip(np.asarray(outcomes.reward).tolist(), np.asarray(outcomes.caught).tolist(), strict=True)
                for row, (scenario, (reward, caught)) in enumerate(zip(self._episodes, paid, strict=True)):
                    key = scenario.row, now, after, decision
                    if key not in followed:
                        found = self._followed(chat, scenario, now, after, decision, caught, reward)
                        if found is None:
                            return None
                        followed[key] = found
                    segment, _ = followed[key]
                    which[row, number, code] = segments.setdefault(segment, len(segments))
        rewinds = {rewind for _, rewind in followed.values()}
        if len(rewinds) != 1:
            return None
        options = tuple((scenario.comply, scenario.violate) for scenario in self._episodes)
        return Script(self._condition.index, tuple(segments), which, options, *rewinds)

    def _followed(
        self, chat: Chat, scenario: Scenario, now: int, after: int, decision: str, caught: bool, reward: float
    ) -> tuple[tuple[int, ...], int] | None:
        """The ids between an answer and the next one, and how many of the prompt before the answer are gone then; None
        where the chat template leaves more than that otherwise."""
        first, second = (words.question(scenario, state, self._pattern, *self._texts) for state in (now, after))
        text = json.dumps({"choice": scenario.violate if decision == "violate" else scenario.comply})
        answer = tuple(chat.answer(text))
        said = words.feedback(scenario, decision, caught, reward, text, *self._texts)
        before = chat.encode(words.messages(scenario, first, (), None, self._parity))
        turn = words.Turn(first, text, answer, said)
        then = chat.encode(words.messages(scenario, second, (turn,), None, self._parity))
        begin = common_prefix(before, then)
        if then[begin : begin + len(answer)] != list(answer):
            return None
        return tuple(then[begin + len(answer) :]), len(before) - begin

    def tell(self, answers: Sequence[Answer]) -> list[dict]:
        """The records of the round that was asked, [E], after the environment paid for these answers."""
        other = "upstream" if self._parity == "default" else "default"
        decisions, others = (
            [
                read_decision(answer.text, scenario.comply, scenario.violate, reading)
                for answer, scenario in zip(answers, self._episodes, strict=True)
            ]
            for reading in (self._parity, other)
        )
        with exact():
            codes = jnp.asarray([DECISIONS.index(decision) for decision in decisions], jnp.int32)
            self._states, outcomes = _step(self._states, codes, self._params)
            rewards, caught = np.asarray(outcomes.reward).tolist(), np.asarray(outcomes.caught).tolist()
        for history, scenario, question, answer, decision, reward, seen in zip(
            self._histories, self._episodes, self._questions, answers, decisions, rewards, caught, strict=True
        ):
            said = words.feedback(scenario, decision, seen, reward, answer.text, *self._texts)
            history.append(words.Turn(question, answer.text, answer.tokens, said))
        rows = zip(self._requests, self._episodes, answers, decisions, others, rewards, caught, strict=True)
        return [
            record(
                request, scenario.row, scenario.environment, answer, decision, other, reward, caught=seen,
                payoff_ratio=scenario.high_reward / scenario.low_reward if scenario.low_reward else None,
            )
            for request, scenario, answer, decision, other, reward, seen in rows
        ]  # fmt: skip


Alone = Lives  # a life of role-play is an agent's own


def _name(model: str, control: str) -> str:
    return model if control == "none" else f"{model}-{control}"


def _params(scenarios: Sequence[Scenario], supervision: np.ndarray) -> env.Params:
    """Parameters of E episodes: payoffs [E] float64, supervision [E, R] int32. Call inside `exact`."""
    return env.Params(
        low_reward=jnp.asarray([s.low_reward for s in scenarios], jnp.float64),
        high_reward=jnp.asarray([s.high_reward for s in scenarios], jnp.float64),
        supervision=jnp.asarray(np.broadcast_to(supervision, (len(scenarios), len(supervision)))),
    )


_step = jax.jit(jax.vmap(env.step))
