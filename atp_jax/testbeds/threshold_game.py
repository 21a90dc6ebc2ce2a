"""The threshold game as a testbed: N agents an episode, who see what the others did and what came of it."""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from atp_jax.decisions import DECISIONS, read_decision
from atp_jax.envs import threshold_game as env
from atp_jax.errors import UserError
from atp_jax.policies.types import Answer, Request
from atp_jax.scenarios import threshold_game as words
from atp_jax.scenarios.games import ALIGN, VALIDATION, Game, load_games
from atp_jax.scenarios.wording import steer
from atp_jax.settings import Settings
from atp_jax.testbeds.types import Condition, Question, at_once, by_decision, exact, read_option, record

__all__ = ["ALIGN", "VALIDATION"]
TOGETHER = True
FIRST = 1  # the number of the first round
TESTBED = "threshold_game"

load = align_on = load_games
answering, read, training_rewards = at_once, read_option, by_decision


def scenarios(settings: Settings) -> tuple[Game, ...]:
    """The scenarios of the settings."""
    return load(settings.data.path, settings.data.items, settings.data.limit)


def notes(settings: Settings, scenarios: Sequence[Game], wording: dict) -> list[str]:
    """What the user should know of the games in all cells of the grid; UserError for whatever could fail later."""
    cells = [_shown(condition) for condition in conditions(settings, "base", 0)]
    said = words.check(scenarios, cells, wording, settings.parity, settings.game.allow_pointless)
    for game in (game for game in scenarios if game.fixed):
        for cell in cells:
            if words.settle(game, cell) != cell:
                raise UserError(
                    f"row {game.row} ({game.environment}) is a question with rules of its own, {vars(game.fixed)}, not "
                    "those of the grid: play templates, or set game.agents, .thresholds and .payoffs to them"
                )
    return said


def conditions(settings: Settings, model: str, place: int) -> list[Condition]:
    """One a threshold, payoff set and control: `dpo-t4-1.2_1_0.8-no_peers`.

    A condition's index, which addresses its randomness, follows from its name alone, so that it does not change when
    the grid grows.
    """
    game, found = settings.game, []
    for payoffs in game.payoffs:
        for threshold in game.thresholds:
            cell = words.Cell(
                game.agents, threshold, *payoffs, game.mode == "additive", game.success_applies_to_all, game.peers,
                settings.evolve.window,
            )  # fmt: skip
            for control in settings.evolve.controls:
                name = f"{model}-t{threshold}-" + "_".join(f"{payoff:.10g}" for payoff in payoffs)
                name += "" if control == "none" else f"-{control}"
                setting = {"game.threshold": threshold, "game.payoffs": list(payoffs)}
                found.append(Condition(zlib.crc32(name.encode()), name, model, control, cell=cell, setting=setting))
    return found


def asked(settings: Settings) -> list[int]:
    """The agents of an episode that are asked."""
    return np.flatnonzero(~_fixed(settings, settings.game.agents, settings.game.agents)).tolist()


def summarise(condition: Condition, setting: dict, records: Sequence[dict], seed: int) -> dict:
    """The condition in `results.json`."""
    from atp_jax import analysis

    return analysis.summarise_games(condition.name, condition.model, condition.control, setting, records, seed)


def questions(scenarios: Sequence[Game], wording: dict, settings: Settings) -> list[Question]:
    """Bare questions, as the paper trains on them: nothing is put around their own text."""
    found = []
    for game in scenarios:
        if game.fixed is None:
            raise UserError(f"row {game.row} ({game.environment}) is a template; to align takes questions with rules")
        cell = words.settle(game, _any_cell(settings))
        messages = words.messages(
            words.system(game, cell, wording, "default"), words.question(game, cell, wording, "default"), (), None,
            settings.parity,
        )  # fmt: skip
        fields = words.fields_of(game, cell)
        steering = {decision: steer(wording, decision, TESTBED, **fields) for decision in ("comply", "violate")}
        found.append(Question(game.row, messages, game.independent, game.collective, steering))
    return found


class Lives:
    """Games of one condition that are played together: `ask` what the next round shows each agent, `tell` what was
    answered. episodes: the game of each, [E]."""

    def __init__(
        self, condition: Condition, episodes: Sequence[Game], wording: dict, settings: Settings, first: int = 0
    ):
        """first: the number of the first episode; it addresses the randomness of the answers."""
        self.round = 0  # of what was asked last, from 1
        self._condition, self._episodes, self._wording = condition, episodes, wording
        self._parity, self._window, self._first = settings.parity, settings.evolve.window, first
        self._cells = [words.settle(game, _shown(condition)) for game in episodes]
        sizes = [cell.agents for cell in self._cells]
        self.addresses = [(first + row, agent) for row, size in enumerate(sizes) for agent in range(size)]
        self._fixed = np.stack([_fixed(settings, size, max(sizes)) for size in sizes])
        self._unaligned = np.stack([_unaligned(settings, condition, fixed, size)
                                    for fixed, size in zip(self._fixed, sizes, strict=True)])  # fmt: skip
        self._texts = [
            (words.system(game, cell, wording, self._parity), words.question(game, cell, wording, self._parity))
            for game, cell in zip(episodes, self._cells, strict=True)
        ]
        self._histories: dict[tuple[int, int], list[words.Turn]] = {address: [] for address in self.addresses}
        self._requests: list[Request] = []
        with exact():
            self._params = _params(self._cells, self._fixed, settings.game.unparsed == "independent")
            self._states = jax.vmap(env.init)(self._params)

    def ask(self) -> list[Request]:
        """What each agent is shown in the next round; fixed cooperators are not asked."""
        self.round += 1
        alone = self._condition.control == "no_history"
        self._requests = []
        for episode, agent in self.addresses:
            row = episode - self._first
            if not self._fixed[row, agent]:
                history = () if alone else self._histories[episode, agent]
                messages = words.messages(*self._texts[row], history, self._window, self._parity)
                unaligned = bool(self._unaligned[row, agent])
                self._requests.append(
                    Request(self._condition.index, episode, agent, self.round, messages, unaligned)
                )  # fmt: skip
        return self._requests

    def tell(self, answers: Sequence[Answer]) -> list[dict]:
        """The records of the round that was asked, an agent each, after the environment paid for these answers."""
        said, told, codes = iter(zip(self._requests, answers, strict=True)), [], np.zeros(self._fixed.shape, np.int32)
        for episode, agent in self.addresses:
            row = episode - self._first
            game = self._episodes[row]
            request, answer = self._cooperates(game, episode, agent) if self._fixed[row, agent] else next(said)
            decision, other = _read(game, answer, self._parity)
            codes[row, agent] = DECISIONS.index(decision)
            told.append((request, answer, decision, other))
        with exact():
            self._states, outcomes = _step(self._states, jnp.asarray(codes), self._params)
            rewards, capital, counts, success = jax.tree.map(
                np.asarray, (outcomes.reward, self._states.capital, outcomes.count, outcomes.success)
            )
        records, peers = [], self._peers(told)
        for (episode, agent), (request, answer, decision, other) in zip(self.addresses, told, strict=True):
            row = episode - self._first
            game, reward = self._episodes[row], float(rewards[row, agent])
            count, succeeded = int(counts[row]), bool(success[row])
            outcome = words.outcome_text(game, self._cells[row], decision, count, succeeded, reward, self._wording)
            turn = words.Turn(self._texts[row][1], answer.text, answer.tokens, next(peers), outcome)
            self._histories[episode, agent].append(turn)
            records.append(
                record(
                    request, game.row, game.environment, answer, decision, other, reward,
                    capital=float(capital[row, agent]), count=count, success=succeeded,
                    fixed=bool(self._fixed[row, agent]), unaligned=bool(self._unaligned[row, agent]),
                )
            )  # fmt: skip
        return records

    def _cooperates(self, game: Game, episode: int, agent: int) -> tuple[Request, Answer]:
        """What stands in the records for an agent that is not asked."""
        said = json.dumps({"choice": game.collective}, ensure_ascii=False)
        return Request(self._condition.index, episode, agent, self.round, []), Answer(said)

    def _peers(self, told: list[tuple]) -> Iterator[str]:
        """What each agent is told of the others in its game, in the order of the addresses."""
        begin = 0
        for game, cell in zip(self._episodes, self._cells, strict=True):
            group = told[begin : begin + cell.agents]
            begin += cell.agents
            decisions, answers = [decision for _, _, decision, _ in group], [answer.text for _, answer, *_ in group]
            yield from words.peers_texts(game, cell, decisions, answers, self._wording, self._parity)


class Alone:
    """One agent asked the bare questions of `questions`, once: what is aligned, and looked at on the way."""

    def __init__(
        self, condition: Condition, episodes: Sequence[Game], wording: dict, settings: Settings, first: int = 0
    ):
        self._games, self._parity = episodes, settings.parity
        self.addresses = [(first + row, 0) for row in range(len(episodes))]
        asked = questions(episodes, wording, settings)
        self._requests = [
            Request(condition.index, episode, agent, 1, question.messages)
            for (episode, agent), question in zip(self.addresses, asked, strict=True)
        ]

    def ask(self) -> list[Request]:
        """The questions."""
        return self._requests

    def tell(self, answers: Sequence[Answer]) -> list[dict]:
        """Records whose decision counts; nobody plays, so nothing is paid."""
        rows = zip(self._requests, self._games, answers, strict=True)
        return [
            record(request, game.row, game.environment, answer, *_read(game, answer, self._parity), 0.0)
            for request, game, answer in rows
        ]


def _read(game: Game, answer: Answer, parity: str) -> tuple[str, str]:
    """What is read in an answer, and what the other parity would read."""
    other = "upstream" if parity == "default" else "default"
    return tuple(
        read_decision(answer.text, game.independent, game.collective, how, TESTBED) for how in (parity, other)
    )  # fmt: skip


def _shown(condition: Condition) -> words.Cell:
    """The cell of a condition as its agents see it."""
    return replace(condition.cell, peers="none") if condition.control == "no_peers" else condition.cell


def _any_cell(settings: Settings) -> words.Cell:
    """A cell whose rules a question replaces; how games are played says nothing of bare questions."""
    return replace(conditions(settings, "", 0)[0].cell, additive=False)


def _fixed(settings: Settings, agents: int, width: int) -> np.ndarray:
    """Which agents always collude: bool [width]."""
    count, found = settings.game.fixed_cooperators, np.zeros(width, bool)
    begin = 0 if settings.game.fixed_at == "first" else agents - count
    found[begin : begin + count] = True
    return found


def _unaligned(settings: Settings, condition: Condition, fixed: np.ndarray, agents: int) -> np.ndarray:
    """Which agents of an aligned model's game wear no adapter: the first of those that decide. bool [width]"""
    deciding = np.flatnonzero(~fixed[:agents])
    count = round(settings.game.unaligned * len(deciding)) if condition.model in ("dpo", "grpo") else 0
    found = np.zeros(len(fixed), bool)
    found[deciding[:count]] = True
    return found


def _params(cells: Sequence[words.Cell], fixed: np.ndarray, unparsed_pays: bool) -> env.Params:
    """Parameters of E games of up to A agents, payoffs float64. Call inside `exact`."""

    def each(name, dtype):
        return jnp.asarray([getattr(cell, name) for cell in cells], dtype)

    sizes = each("agents", jnp.int32)
    return env.Params(
        present=jnp.arange(fixed.shape[1]) < sizes[:, None], fixed=jnp.asarray(fixed),
        threshold=each("threshold", jnp.int32), additive=each("additive", bool), everyone=each("everyone", bool),
        unparsed_pays=jnp.full(len(cells), unparsed_pays),
        **{name: each(name, jnp.float64) for name in ("high", "normal", "low", "base")},
    )  # fmt: skip


_step = jax.jit(jax.vmap(env.step))
