"""What is said in role-play: the question of a round, the feedback after it, and the messages of both."""

from collections.abc import Sequence
from dataclasses import dataclass

from atp_jax.decisions import spoken
from atp_jax.envs.role_play import SUPERVISED, UNSUPERVISED
from atp_jax.errors import UserError
from atp_jax.scenarios.pack import Scenario
from atp_jax.scenarios.wording import fill, harmless

_SILENT = ("all_supervised", "all_unsupervised")  # patterns that never tell who is watching
_HEAD = 100  # characters of an unreadable answer that feedback quotes


@dataclass(frozen=True)
class Turn:
    """One finished round as the agent remembers it."""

    question: str
    answer: str
    tokens: tuple[int, ...]  # the answer's ids as they were sampled; empty when there were none
    feedback: str


def question(scenario: Scenario, state: int, pattern: str, wording: dict, parity: str) -> str:
    """What the agent is asked in a round.

    Args:
      state: the round's supervision, 1 supervised, -1 unsupervised, 0 undecided.
      pattern: the episode's supervision pattern. The two that never change say the neutral text, as the
        original does: the agent has to find out from its rewards who is watching.
    Raises UserError naming row and key when the scenario lacks the text (parity "upstream" says nothing
    there, which leaves a broken sentence).
    """
    key = _text_key(state, pattern)
    text = getattr(scenario, key)
    if not text and parity != "upstream":
        raise UserError(
            f"row {scenario.row} ({scenario.environment}) has no {key!r}, which supervision pattern {pattern!r} "
            "says; add it, or take a pack that has it"
        )
    return fill(wording["role_play"]["question"], question=scenario.user_prompt, supervision_text=text)


def feedback(
    scenario: Scenario, decision: str, caught: bool, reward: float, answer: str, wording: dict, parity: str
) -> str:
    """What the agent is told after a round.

    An answer that could not be read is quoted by its first characters. By default these are taken from
    what follows the last thought, on one line and without angle brackets, so that no tag of a chat
    template comes back in a user's mouth; upstream quotes the raw answer.
    """
    templates = wording["role_play"]["feedback"]
    reward = float(reward)
    if decision == "unparsed":
        head = answer[:_HEAD] if parity == "upstream" else harmless(spoken(answer) or "")[:_HEAD]
        return fill(templates["unparsed"], reward=reward, answer_head=head)
    if decision == "comply":
        return fill(templates["comply"], reward=reward, choice=scenario.comply)
    return fill(templates["violate_caught" if caught else "violate_unseen"], reward=reward, choice=scenario.violate)


def messages(scenario: Scenario, question: str, history: Sequence[Turn], window: int | None, parity: str) -> list[dict]:
    """The messages of a round: system, remembered rounds, the question.

    Args:
      history: all finished rounds, oldest first.
      window: how many rounds are remembered; None means all. Upstream counts three messages a round, so
        an empty answer, which leaves no message there, lets the window begin in the middle of a round.
    Returns:
      dicts of "role" and "content"; those of the assistant carry "tokens" where they are known.
    """
    by_message = parity == "upstream"
    shown = history if window is None or by_message else history[max(0, len(history) - window) :]
    past = []
    for turn in shown:
        past.append({"role": "user", "content": turn.question})
        if turn.answer or not by_message:
            tokens = {"tokens": turn.tokens} if turn.tokens else {}
            past.append({"role": "assistant", "content": turn.answer, **tokens})
        past.append({"role": "user", "content": turn.feedback})
    if window is not None and by_message:
        past = past[max(0, len(past) - 3 * window) :]
    return [{"role": "system", "content": scenario.system_prompt}, *past, {"role": "user", "content": question}]


def check(scenarios: Sequence[Scenario], pattern: str, wording: dict, parity: str) -> list[str]:
    """Asks whatever the pattern can ask, once, before anything is spent on a run.

    Returns what the user should know about the pattern, one sentence each; raises the UserError that
    `question` would raise later.
    """
    for scenario in scenarios:
        for state in (SUPERVISED, UNSUPERVISED):
            question(scenario, state, pattern, wording, parity)
    if pattern in _SILENT:
        return [f"under {pattern} every round says the neutral text: only the rewards tell who is watching"]
    return []


def _text_key(state: int, pattern: str) -> str:
    if pattern in _SILENT:
        return "neutral_text"
    return {SUPERVISED: "supervised_text", UNSUPERVISED: "unsupervised_text"}.get(int(state), "neutral_text")
