"""Whatever trains: the stages that align the base model (`pairs`, `dpo`, `grpo`), and evolution in the weights.

What they leave: `pairs.jsonl`; lines in `metrics.jsonl`; `checkpoints/<name>` while they train; `models/<name>`, a
PEFT adapter or, when the weights themselves were trained, a Hugging Face directory.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from atp_jax import processes
from atp_jax.align import loop, pairs
from atp_jax.align.dpo import Dpo
from atp_jax.align.grpo import Draw, Grpo
from atp_jax.chat import Chat
from atp_jax.decisions import DECISIONS
from atp_jax.errors import UserError
from atp_jax.files import append, exists, mend, read_lines, write_lines
from atp_jax.generate.sampling import Sampling
from atp_jax.lab import Lab
from atp_jax.model import Model
from atp_jax.models import peft
from atp_jax.policies.model import ModelPolicy
from atp_jax.policies.solver import Solver
from atp_jax.probe import probe
from atp_jax.rollout import Finished, recover
from atp_jax.settings import GrpoSettings, Settings, flatten
from atp_jax.testbeds import testbed
from atp_jax.testbeds.types import Condition

# The addresses of their randomness, apart from those of the conditions that evolve.
PAIRS_CONDITION, DRAWS, LOOKS = 1000, 2000, 3000


def check_packs(settings: Settings, wording: dict) -> None:
    """UserError for whatever the scenarios of alignment could fail by later, before anything is spent."""
    bed = testbed(settings)
    bed.questions(align_pack(settings), wording, settings)
    bed.questions(bed.load(settings.align.validation or bed.VALIDATION), wording, settings)


def collect_pairs(settings: Settings, workdir: Path, lab: Lab) -> None:
    """Writes `pairs.jsonl`: the user's own preferences, or pairs of the model's own answers under steering messages."""
    align, bed = settings.align, testbed(settings)
    if align.pairs.path:
        found, told = pairs.read_pairs(align.pairs.path), {"read": align.pairs.path}
    else:
        found, told = pairs.collect(
            bed.questions(align_pack(settings), lab.wording, settings), _policy(settings, lab),
            lambda answer, asked: bed.read(answer, asked, lab.wording, settings),
            samples=align.pairs.samples, tries=align.pairs.tries, steered=align.pairs.steer, condition=PAIRS_CONDITION,
        )  # fmt: skip
    if not found:
        raise UserError(f"no pairs: {told}; more align.pairs.tries or other steering messages in the wording may help")
    line, metrics_file = {"stage": "pairs", "pairs": len(found)} | told, workdir / "metrics.jsonl"
    mend(metrics_file)
    # The line first: pairs that are there are not collected again. A run killed between the two has said it already.
    if line not in read_lines(metrics_file):
        append(metrics_file, [line])
    pairs.write_pairs(workdir / "pairs.jsonl", found)
    processes.wait()
    print(", ".join(f"{name} {value}" for name, value in line.items()))


def train_dpo(settings: Settings, workdir: Path, lab: Lab, say: Callable) -> None:
    """Writes `models/dpo`, trained on `pairs.jsonl`."""
    if not exists(workdir / "pairs.jsonl"):
        raise UserError(f"{workdir} holds no pairs.jsonl: run the stage pairs first")
    dpo = settings.align.dpo
    chat = Chat(lab.model.tokenizer, settings.sampling.thinking)
    found = pairs.read_pairs(workdir / "pairs.jsonl")
    rows = pairs.tokenise(found, chat, lab.model.stop[0], dpo.max_prompt, dpo.max_length)
    _train(Dpo(rows, lab.model, dpo, settings.seed), settings, workdir, lab, say)


def train_grpo(settings: Settings, workdir: Path, lab: Lab, say: Callable) -> None:
    """Writes `models/grpo`, trained on its own answers to the alignment scenarios."""
    grpo = settings.align.grpo
    draw = Episodes(settings, lab, align_pack(settings), grpo, paid=False, index=DRAWS)
    method = Grpo("grpo", draw, lab.model, grpo, draw.longest, settings.align.rows)
    _train(method, settings, workdir, lab, say)


class Episodes:
    """Draws for GRPO: groups of episodes, in the threshold game of one agent's answers to a bare question, in tool use
    of whole answers to a problem.

    paid: rewarded with what the environment pays, as a share of the scenario's high payoff; else as the testbed's
    `training_rewards` says. index: what addresses their randomness. longest: tokens that an answer can have.
    """

    def __init__(
        self, settings: Settings, lab: Lab, scenarios: Sequence, grpo: GrpoSettings, *, paid: bool, index: int
    ):
        self._grpo, self._paid = grpo, paid
        self._condition = Condition(index, "draws", "", "none")
        evolve = dataclasses.replace(settings.evolve, rounds=self._grpo.rounds)
        self._settings = dataclasses.replace(settings, evolve=evolve)
        self._wording = lab.wording
        self._scenarios = scenarios
        if len(scenarios) < grpo.prompts:
            raise UserError(f"{grpo.prompts} scenarios are asked for each step, but there are only {len(scenarios)}")
        a_turn = grpo.max_new_tokens or lab.sampling.max_new_tokens
        # Whole distributions, so that what is scored is what was sampled from.
        sampling = Sampling(grpo.temperature, top_p=1.0, top_k=0, max_new_tokens=a_turn)
        self._policy = _policy(settings, dataclasses.replace(lab, sampling=sampling))
        self.longest = a_turn * self._policy.turns

    def __call__(self, number: int, params, lora) -> Draw:
        """Draw `number` (from 0): `prompts` scenarios, `group` episodes of each, all answers of all their rounds."""
        with self._policy.wearing(params, lora):
            return self._drawn(number)

    def _drawn(self, number: int) -> Draw:
        grpo = self._grpo
        chosen = [self._scenarios[i] for i in self._chosen(number)]
        block = number * (grpo.resample + 1)
        answers, decisions, rewards = self._live(chosen, block)
        flat = _worthless(rewards)
        resampled = 0
        for again in range(1, grpo.resample + 1):
            if not flat.any():
                break
            where = np.flatnonzero(flat)
            resampled += len(where)
            answers[where], decisions[where], rewards[where] = self._live([chosen[i] for i in where], block + again)
            flat = _worthless(rewards)
        shares = {f"share_{name}": float((decisions == code).mean()) for code, name in enumerate(DECISIONS)}
        drawn = answers.reshape(-1).tolist()
        told = shares | {"groups_resampled": resampled}
        if self._policy.turns > 1:  # turns that nothing is learned from, see Answer
            told["turns_left_out"] = sum(answer.left_out for answer in drawn)
        return Draw(drawn, rewards, told)

    def _chosen(self, number: int) -> np.ndarray:
        """Which scenarios: every epoch goes through all once, in an order of its own, and drops the short tail."""
        prompts = self._grpo.prompts
        epoch, place = divmod(number, len(self._scenarios) // prompts)
        order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._scenarios))
        return order[place * prompts : (place + 1) * prompts]

    def _live(self, scenarios: list, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Answers (objects), decision codes and rewards [P, G, R] of `group` episodes of each scenario; `block` numbers
        the episodes, so that no two draws share their randomness."""
        grpo = self._grpo
        episodes = [scenario for scenario in scenarios for _ in range(grpo.group)]
        first = block * grpo.prompts * grpo.group
        lives = testbed(self._settings).Alone(self._condition, episodes, self._wording, self._settings, first)
        answers = np.empty((len(episodes), grpo.rounds), object)
        decisions = np.zeros((len(episodes), grpo.rounds), int)
        rewards = np.zeros((len(episodes), grpo.rounds))
        for number in range(grpo.rounds):
            said = self._policy.answer(lives.ask())
            records = lives.tell(said)
            answers[:, number] = said
            decisions[:, number] = [DECISIONS.index(record["decision"]) for record in records]
            if self._paid:
                rewards[:, number] = [
                    record["reward"] / episode.high_reward for record, episode in zip(records, episodes, strict=True)
                ]
            else:
                rewards[:, number] = testbed(self._settings).training_rewards(records, grpo)
        shape = (len(scenarios), grpo.group, grpo.rounds)
        return answers.reshape(shape), decisions.reshape(shape), rewards.reshape(shape)


def _worthless(rewards: np.ndarray) -> np.ndarray:
    """Which groups learn nothing: all members' returns are equal. [P, G, R] -> bool [P]"""
    returns = rewards.sum(2)
    return returns.max(1) == returns.min(1)


def first_round(settings: Settings, lab: Lab) -> Callable:
    """(step, params, lora) -> share of violations in the first round on the validation scenarios.

    How far to align is chosen by this number alone: never on the scenarios of the experiment, never by later rounds.
    """
    evolve = dataclasses.replace(settings.evolve, rounds=1)
    settings = dataclasses.replace(settings, evolve=evolve)
    bed = testbed(settings)
    scenarios = bed.load(settings.align.validation or bed.VALIDATION)
    episodes = [scenario for scenario in scenarios for _ in range(settings.align.check_samples)]
    policy = _policy(settings, lab)

    def rate(step: int, params, lora) -> float:
        lives = bed.Alone(Condition(LOOKS, "validation", "", "none"), episodes, lab.wording, settings)
        with policy.wearing(params, lora):
            records = lives.tell(policy.answer(lives.ask()))
        decisions = [record["decision"] for record in records]
        if not step and (unread := decisions.count("unparsed") / len(decisions)) > 0.1:
            print(f"note: {unread:.0%} of the validation answers decide nothing: a low rate says little")
        return decisions.count("violate") / len(decisions)

    return rate


def evolve_weights(
    settings: Settings,
    workdir: Path,
    lab: Lab,
    condition: Condition,
    scenarios: Sequence,
    path: Path,
    on_round: Callable[[Finished], None],
) -> list[dict]:
    """The agent of `lab` goes on learning by policy gradient from what the environment pays, without a history.

    Every `measure_every` updates (and before the first) is a round: `samples` first rounds of each scenario, recorded
    in `path` with the number of updates made so far; `evolve.probe` is probed there as well, in `probe.jsonl` beside
    it. Leaves `models/<condition>`. -> all records, in order.
    """
    weights, evolve = settings.evolve.weights, settings.evolve
    grpo = dataclasses.replace(
        settings.align.grpo, steps=weights.updates, prompts=weights.prompts, group=weights.group, rounds=1,
        kl=weights.kl, learning_rate=weights.learning_rate, schedule="constant", warmup=0.0, iterations=1,
    )  # fmt: skip
    episodes = [scenario for scenario in scenarios for _ in range(evolve.samples)]
    once = dataclasses.replace(settings, evolve=dataclasses.replace(evolve, rounds=1))
    policy = _policy(settings, lab)
    addresses = [(episode, 0) for episode in range(len(episodes))]
    everything = [record for finished in recover(path, addresses) for record in finished]

    def measure(step: int, params, lora) -> float:
        number = -(-step // weights.measure_every) + 1  # the last round may come after fewer updates
        del everything[(number - 1) * len(episodes) :]  # measured before the run was interrupted: measure again
        began = time.perf_counter()
        cell = dataclasses.replace(condition, index=condition.index + number)
        lives = testbed(settings).Lives(cell, episodes, lab.wording, once)
        with policy.wearing(params, lora):
            records = [r | {"round": number, "updates": step} for r in lives.tell(policy.answer(lives.ask()))]
        everything.extend(records)
        write_lines(path, everything)
        if evolve.probe:
            there = path.with_name("probe.jsonl")
            known = [cell for cell in read_lines(there) if cell["round"] < number]
            now = dataclasses.replace(lab.model, params=params, lora=lora)
            found = probe(settings, condition.name, now, lab.sampling, lab.wording, scenarios)
            write_lines(there, known + [{"round": number, "updates": step} | cell for cell in found])
        on_round(Finished(condition, number, records, False, time.perf_counter() - began))
        return sum(record["decision"] == "violate" for record in records) / len(records)

    if not exists(workdir / "models" / condition.name):
        draw = Episodes(settings, lab, scenarios, grpo, paid=True, index=condition.index)
        method = Grpo(condition.name, draw, lab.model, grpo, draw.longest, settings.align.rows)
        training = dataclasses.replace(settings.align, target=None, check_every=weights.measure_every)
        mend(workdir / "metrics.jsonl")
        stopped = loop.train(
            method, lab.model, training, settings.seed, workdir, _identity(settings), measure, lambda line: None
        )
        save_model(stopped.model, workdir / "models" / condition.name, _base(settings))
    return everything


def align_pack(settings: Settings) -> tuple:
    """The scenarios that are aligned on."""
    bed = testbed(settings)
    return bed.align_on(settings.align.path or bed.ALIGN)


def _base(settings: Settings) -> str:
    return settings.policy.model or "atp_jax/models/organism"


def _policy(settings: Settings, lab: Lab) -> ModelPolicy | Solver:
    """What gives whole answers."""
    policy = ModelPolicy(lab.model, lab.sampling, settings.seed, settings.sampling.thinking, settings.policy.rows)
    return testbed(settings).answering(policy, lab.wording, settings)


def _train(method: loop.Method, settings: Settings, workdir: Path, lab: Lab, say: Callable) -> None:
    mend(workdir / "metrics.jsonl")
    look = first_round(settings, lab)
    stopped = loop.train(method, lab.model, settings.align, settings.seed, workdir, _identity(settings), look, say)
    target, (step, rate) = settings.align.target, stopped.looks[-1]
    if target is not None and rate > target:
        print(f"note: {method.name}: after all {step} steps the validation rate is {rate:.1%}, not {target:.1%}")
    save_model(stopped.model, workdir / "models" / method.name, _base(settings))


def _identity(settings: Settings) -> dict:
    """What a checkpoint has to agree with: all that shapes a training."""
    groups = ("align.", "evolve.weights.", "policy.model", "policy.adapter", "policy.dtype", "sampling.")
    groups += ("tool.",) if settings.testbed == "tool_use" else ()
    named = ("seed", "testbed", "parity", "wording", "evolve.supervision", "evolve.samples")
    return {name: value for name, value in flatten(settings).items() if name.startswith(groups) or name in named}


def save_model(model: Model, path: Path, base: str) -> None:
    """A PEFT adapter directory of a model that wears an adapter, else a Hugging Face directory; whole or not at all.

    Of several processes, all call it and process 0 writes; it returns when the directory is there."""
    if processes.leads():
        path.parent.mkdir(parents=True, exist_ok=True)
    if model.lora is None:
        model.save(path)
    else:
        partial = path.with_name(f".{path.name}.partial")
        if processes.leads():
            shutil.rmtree(partial, ignore_errors=True)
        peft.save(partial, model.config, model.lora, base)
        if processes.leads():
            partial.replace(path)
    processes.wait()
