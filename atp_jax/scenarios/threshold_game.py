"""What is said in the threshold game: the rules, the question of a round, what the others did and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atp_jax.decisions import spoken
from atp_jax.errors import UserError
from atp_jax.scenarios.games import Game, check_rules
from atp_jax.scenarios.wording import fill, harmless


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: the rules that a game is played by, and what its agents get to see."""

    agents: int
    threshold: int
    high: float
    normal: float
    low: float
    additive: bool  # capital grows by (factor - 1) * base instead of being multiplied
    everyone: bool  # a success pays everyone, else only those who colluded
    peers: str  # of the others: their "final_only" choices, their "full" answers, or "none", the control without peers
    window: int | None  # rounds that are remembered; None means all
    base: float = 1.0


@dataclass(frozen=True)
class Turn:
    """One finished round as an agent remembers it."""

    question: str
    answer: str
    tokens: tuple[int, ...]  # the answer's ids as they were sampled; empty when there were none
    peers: str  # what the others did; empty when that is not shown
    outcome: str


def settle(game: Game, cell: Cell) -> Cell:
    """The cell that a game is played in: with the game's own rules where they are fixed."""
    return cell if game.fixed is None else replace(cell, **vars(game.fixed))


def system(game: Game, cell: Cell, wording: dict, parity: str) -> str:
    """The system message: the situation and how to answer.

    A question says that itself, so nothing is put around it; upstream puts it there all the same when a
    question is played, though not when it is trained on.
    """
    situation = fill(game.system, **_placeholders(cell, parity))
    if game.fixed is not None and parity != "upstream":
        return situation
    templates, fields = wording["threshold_game"], fields_of(game, cell)
    success = fill(templates.get("success", {}).get("everyone" if cell.everyone else "choosers", ""), **fields)
    return fill(templates["system"][_mode(cell)], system=situation, success=success, **fields)


def question(game: Game, cell: Cell, wording: dict, parity: str) -> str:
    """What every agent is asked in every round: the prompt of a question as it stands, that of a template worded.

    Raises UserError naming the row when a question, whose payoffs are factors, is to be played additively.
    """
    if cell.additive and not game.additive:
        raise UserError(
            f"row {game.row} ({game.environment}) is a question whose payoffs multiply; "
            "game.mode=additive takes a pack of templates"
        )
    asked = fill(game.additive if cell.additive else game.multiplicative, **_placeholders(cell, parity))
    if game.fixed is not None:
        return asked
    return fill(wording["threshold_game"]["question"], question=asked, **fields_of(game, cell))


def peers_texts(
    game: Game, cell: Cell, decisions: Sequence[str], answers: Sequence[str], wording: dict, parity: str
) -> list[str]:
    """What each agent is told of the others' last round; all empty under `peers="none"`.

    By default a "full" answer is shown without its thoughts, on one line and without angle brackets, and
    one that says nothing else as one that could not be read; upstream shows it raw.

    Args:
      decisions, answers: of all agents in their order, fixed cooperators included.
    """
    if cell.peers == "none":
        return [""] * len(decisions)
    templates = wording["threshold_game"]["peers"]
    names = {"comply": game.independent, "violate": game.collective}
    said = []
    for agent, (decision, answer) in enumerate(zip(decisions, answers, strict=True)):
        if cell.peers == "full":
            shown = answer if parity == "upstream" else harmless(spoken(answer) or "")
            readable = shown or parity == "upstream"
            said.append(fill(templates["full" if readable else "unparsed"], agent=agent, answer=shown))
        elif decision in names:
            said.append(fill(templates["final_only"], agent=agent, choice=names[decision]))
        else:
            said.append(fill(templates["unparsed"], agent=agent))
    prefix, join = fill(templates["prefix"], **fields_of(game, cell)), fill(templates["join"])
    return [prefix + join.join(said[:own] + said[own + 1 :]) for own in range(len(said))]


def outcome_text(game: Game, cell: Cell, decision: str, count: int, success: bool, reward: float, wording: dict) -> str:
    """What an agent that decided on `decision` is told after a round: how many colluded, what came of it and what it
    earned itself; under `peers="none"` only the last."""
    templates, fields, reward = wording["threshold_game"], fields_of(game, cell), float(reward)
    if cell.peers == "none":
        if "outcome_alone" not in templates:
            raise UserError("the wording pack has no 'threshold_game.outcome_alone', which the control no_peers says")
        text = fill(templates["outcome_alone"], reward=reward, **fields)
    else:
        key = ("success_everyone" if cell.everyone else "success_choosers") if success else "failure"
        result = fill(templates["result"][_mode(cell)][key], **fields)
        text = fill(
            templates["outcome"], count=count, share=count / cell.agents, result=result, reward=reward, **fields
        )
    if decision == "unparsed" and "unreadable" in templates:
        return f"{fill(templates['unreadable'])} {text}"
    return text


def messages(system: str, question: str, history: Sequence[Turn], window: int | None, parity: str) -> list[dict]:
    """The messages of a round: system, remembered rounds, the question.

    What the others did and what came of it are one message by default, the others first, and two upstream.

    Args:
      history: all finished rounds, oldest first.
      window: how many rounds are remembered; None means all.
    Returns:
      dicts of "role" and "content"; those of the assistant carry "tokens" where they are known.
    """
    past = []
    for turn in history if window is None else history[max(0, len(history) - window) :]:
        past.append({"role": "user", "content": turn.question})
        tokens = {"tokens": turn.tokens} if turn.tokens else {}
        past.append({"role": "assistant", "content": turn.answer, **tokens})
        told = [text for text in (turn.peers, turn.outcome) if text]
        past += [{"role": "user", "content": text} for text in (told if parity == "upstream" else ["\n".join(told)])]
    return [{"role": "system", "content": system}, *past, {"role": "user", "content": question}]


def check(
    games: Sequence[Game], cells: Sequence[Cell], wording: dict, parity: str, allow_pointless: bool = False
) -> list[str]:
    """Says whatever the games can say in these cells, once, before anything is spent on a run.

    Returns what the user should know about the rules, one sentence each; raises the UserError that a
    later call would raise.
    """
    said = []
    for game in games:
        for cell in (settle(game, cell) for cell in cells):
            said += check_rules(cell.agents, cell.threshold, cell.high, cell.normal, cell.low, allow_pointless)
            system(game, cell, wording, parity)
            question(game, cell, wording, parity)
            peers_texts(game, cell, ("comply", "violate", "unparsed"), ("", "yes", "no"), wording, parity)
            for success in (True, False):
                outcome_text(game, cell, "unparsed", 1, success, 0.0, wording)
    return list(dict.fromkeys(said))


def _mode(cell: Cell) -> str:
    return "additive" if cell.additive else "multiplicative"


def _deltas(cell: Cell) -> dict[str, float]:
    factors = {"delta_high": cell.high, "delta_normal": cell.normal, "delta_low": cell.low}
    return {name: (float(factor) - 1.0) * cell.base for name, factor in factors.items()}


def _placeholders(cell: Cell, parity: str) -> dict:
    """What the placeholders of a template stand for."""
    digits = 2 if parity == "upstream" else 10  # as the original rounds them, or so that no idle digits show
    return {
        "n": cell.agents,
        "cooperation_threshold": cell.threshold,
        "high_reward": float(cell.high),
        "normal_reward": float(cell.normal),
        "low_reward": float(cell.low),
        **{name: round(delta, digits) for name, delta in _deltas(cell).items()},
    }


def fields_of(game: Game, cell: Cell) -> dict:
    """What the fields of a wording stand for."""
    return {
        "collective": game.collective,
        "independent": game.independent,
        "agents": cell.agents,
        "threshold": cell.threshold,
        "high": float(cell.high),
        "normal": float(cell.normal),
        "low": float(cell.low),
        "additive_base": float(cell.base),
        **_deltas(cell),
    }
