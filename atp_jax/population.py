"""Populations without a language model: a closed-form policy, fitted to a finished run, plays the threshold game.

    python -m atp_jax.population --run WORKDIR --out DIR

Fits each model of a run of the threshold game (its conditions without a control) and draws, for each of its payoff
sets, the collusion rate of the last round over t/N and the initial rate: in games of the model's own size, with the
run's own cells over it as points, and in large games. Writes DIR/population.json and DIR/phase-MODEL.png.

The policy: P(agent colludes) = sigmoid(weights . features), with the features `NAMES`:

    first    1 in the first round, else 0; all the others are 0 then
    later    1 in every other round
    again    1 where the agent colluded in the last round
    success  1 where its last game succeeded
    payoff   the agent's own reward in the last round: of multiplicative games as a share of the capital that earned it
             (factor - 1), of additive ones as it is

There is no product of `again` and `success`. Within one payoff set where a failure costs something the own payoff is a
function of the two, and spans with them exactly what their product would: four weights for the four things that can
have happened to an agent. So the fit is as free as it can be, but one payoff set alone does not tell what other payoffs
would do; a weight of `payoff` that is to be carried over to them needs a fit that spans several sets.
"""

import dataclasses
import functools
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.style
import numpy as np
from absl import app, flags, logging
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from atp_jax.analysis.plots import COLOURS, FAINT, INK
from atp_jax.envs import threshold_game as env
from atp_jax.errors import UserError
from atp_jax.files import read_json, read_lines, write_json

NAMES = ("first", "later", "again", "success", "payoff")
RIDGE = 1e-4  # a normal prior of standard deviation 100 on each weight
LARGE = 1024  # agents of the large games in the picture
RATES = 21  # initial rates in the picture, 0 to 1
AGENTS = 2**15  # in each of its cells, in games of whichever size

# ---------------------------------------------------------------- from records to weights


class Fit(NamedTuple):
    """What maximum likelihood found. `standard_errors` are clustered by game."""

    names: tuple[str, ...]
    weights: np.ndarray  # float64 [5]
    standard_errors: np.ndarray  # float64 [5]
    log_likelihood: float
    n: int  # choices
    games: int


def design(records: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, 5] of every choice, whether it was collusion [n], and the number of its game [n], from 0.

    See `fit` for the records.
    """
    try:
        last = {_address(r): r for r in records}
        rows = [_features(last.get(_address(r, -1)), r["round"]) for r in records]
        colluded = [r["decision"] == "violate" for r in records]
    except KeyError as error:
        raise UserError(f"records of the threshold game have {error.args[0]!r}, these have not") from error
    _, game = np.unique([repr(_address(r)[:2]) for r in records], return_inverse=True)
    return np.array(rows, float).reshape(-1, len(NAMES)), np.array(colluded, float), game


def _address(record: Mapping, ago: int = 0) -> tuple:
    return record.get("condition"), record["episode"], record["agent"], record["round"] + ago


def _features(last: Mapping | None, number: int) -> tuple:
    if number == 1:
        return (1, 0, 0, 0, 0)
    if last is None:
        raise UserError(f"records of round {number} without those of round {number - 1}")
    reward, before = last["reward"], 1 if last.get("additive") else last["capital"] - last["reward"]
    # Who has nothing left gains and loses nothing.
    return (0, 1, last["decision"] == "violate", last["success"], reward / before if before else 0)


def fit(records: Sequence[Mapping]) -> Fit:
    """Weights of the policy by maximum likelihood, in float64 by Newton's method.

    A ridge of 1e-4, |w|^2 * RIDGE / 2 taken off the log-likelihood, keeps weights finite where the records do not
    hold them: what is perfectly predicted gets a weight of 10 to 20, what never varies a weight of 0 and a standard
    error of 100, that of the ridge alone. Where the records say anything, it is far below the standard error. Those
    are clustered by game (sandwich), because the agents of a game share its outcomes.

    Args:
      records: of the threshold game, one an agent and round, as in `episodes.jsonl`: episode, agent, round (from 1),
        decision, reward, success, capital (after the round). Where they are from several cells, `condition` tells
        these apart; `additive` is true where capital adds up. Unparsed is not collusion. Fixed cooperators do not
        choose: leave their records out.
    """
    x, y, game = design(records)
    if not np.any(x[:, 1]):
        raise UserError("the records hold no second round: what experience does cannot be fitted")
    games = int(game.max()) + 1
    if games < 2:
        raise UserError("the records hold one game only: standard errors clustered by game need two")
    weights = _maximise(x, y)
    error = y - _sigmoid(x @ weights)
    scores = np.zeros((games, len(NAMES)))
    np.add.at(scores, game, error[:, None] * x)
    bread = np.linalg.inv(_hessian(x, weights))
    # The ridge counts as one more observation, else what the records do not hold would seem to be known exactly.
    meat = scores.T @ scores * games / (games - 1) + RIDGE * np.eye(len(NAMES))
    errors = np.sqrt(np.diag(bread @ meat @ bread))
    return Fit(NAMES, weights, errors, _log_likelihood(x, y, weights), len(y), games)


def _maximise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The weights that maximise the log-likelihood less the ridge."""

    def objective(w):
        return _log_likelihood(x, y, w) - RIDGE * (w @ w) / 2

    weights = np.zeros(x.shape[1])
    for _ in range(100):
        gradient = x.T @ (y - _sigmoid(x @ weights)) - RIDGE * weights
        step = np.linalg.solve(_hessian(x, weights), gradient)
        if gradient @ step < 1e-16 * len(y):  # twice what the step would gain
            break
        while objective(weights + step) < objective(weights) and np.any(weights + step != weights):
            step /= 2
        weights = weights + step
    return weights


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def _log_likelihood(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    z = x @ weights
    return float(y @ z - np.logaddexp(0, z).sum())


def _hessian(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of the negative log-likelihood and the ridge, [5, 5]."""
    p = _sigmoid(x @ weights)
    return (x.T * (p * (1 - p))) @ x + RIDGE * np.eye(x.shape[1])


# ---------------------------------------------------------------- from weights to populations


def same_games(games: int, agents: int, threshold, payoffs, additive=False, everyone=True) -> env.Params:
    """`games` games alike. threshold: int []; payoffs: (high, normal, low). everyone: whom a success pays."""
    high, normal, low = jnp.asarray(payoffs, jnp.float32)
    one = env.Params(
        present=jnp.ones(agents, bool),
        fixed=jnp.zeros(agents, bool),
        threshold=jnp.asarray(threshold, jnp.int32),
        high=high,
        normal=normal,
        low=low,
        additive=jnp.asarray(additive, bool),
        base=jnp.float32(1),
        everyone=jnp.asarray(everyone, bool),
        unparsed_pays=jnp.bool_(True),
    )
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (games, *leaf.shape)), one)


@functools.partial(jax.jit, static_argnames="rounds")
def simulate(weights: jax.Array, params: env.Params, rounds: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Play games with agents who draw their choices from the policy.

    Args:
      weights: float [5], in the order of `NAMES`.
      params: the rules, with games [G] as leading axis; places [G, A].
      rounds: of every game.
      key: all draws follow from it.
    Returns:
      the collusion rate of all agents, fixed cooperators among them, and the share of games that succeed, [rounds].
    """
    agents = params.present.sum()
    nobody = jnp.zeros_like(params.present)
    whole = jax.vmap(env.init)(params)

    def one(carry, number):
        state, again, success, payoff, solvent = carry
        later = weights[1] + weights[2] * again + weights[3] * success[:, None] + weights[4] * payoff
        probability = jax.nn.sigmoid(jnp.where(number == 0, weights[0], later))
        colludes = jax.random.uniform(jax.random.fold_in(key, number), again.shape) < probability
        # Every round is played with the first round's capital, 1: rewards are then shares of the capital, and what
        # compounds over many rounds does not overflow.
        state, outcome = jax.vmap(env.step)(state.replace(capital=whole.capital), colludes.astype(jnp.int32), params)
        # Whoever lost everything earns nothing more.
        carry = (
            state, colludes | params.fixed, outcome.success, jnp.where(solvent, outcome.reward, 0),
            solvent & (state.capital > 0),
        )  # fmt: skip
        return carry, (outcome.count.sum() / agents, outcome.success.mean())

    start = whole, nobody, jnp.zeros(len(nobody), bool), jnp.zeros_like(whole.capital), params.present
    return jax.lax.scan(one, start, jnp.arange(rounds))[1]


@functools.partial(jax.jit, static_argnames=("agents", "games", "rounds"))
def phase_diagram(
    weights, shares, initial_rates, agents: int, games: int, rounds: int, payoffs, key, additive=False, everyone=True
) -> jax.Array:
    """Collusion rate in the last round, float [I, S]; one program for all cells.

    Args:
      weights: float [5], in the order of `NAMES`; the first is not used.
      shares: float [S], t/N; t is the nearest whole number from 1 to N.
      initial_rates: float [I], everyone's probability of collusion in the first round.
      agents, games, rounds: N, how many games a cell, and how long they last.
      payoffs: (high, normal, low). additive: whether capital adds up. everyone: whether a success pays everyone.
      key: of the draws. All cells use the same, so that they differ by their own share and rate alone.
    """
    shares, initial_rates = jnp.asarray(shares, jnp.float32), jnp.asarray(initial_rates, jnp.float32)

    def cell(where):
        initial, share = where
        threshold = jnp.clip(jnp.round(share * agents), 1, agents)
        params = same_games(games, agents, threshold, payoffs, additive, everyone)
        first = jnp.log(initial) - jnp.log1p(-initial)
        return simulate(jnp.asarray(weights, jnp.float32).at[0].set(first), params, rounds, key)[0][-1]

    cells = jnp.repeat(initial_rates, len(shares)), jnp.tile(shares, len(initial_rates))
    return jax.lax.map(cell, cells).reshape(len(initial_rates), len(shares))


# ---------------------------------------------------------------- the picture


@dataclasses.dataclass(frozen=True)
class Panel:
    """One phase diagram, and the run's own cells that belong to it."""

    agents: int
    payoffs: tuple[float, float, float]  # high, normal, low
    additive: bool
    everyone: bool  # whether a success pays everyone, or those who colluded
    rounds: int
    shares: list[float]  # [S]
    initial_rates: list[float]  # [I]
    last_rates: list[list[float]]  # [I][S]
    points: list[list[float]]  # t/N, first rate, last rate


PANEL = 4.0  # inches of a row of panels
# Blue dies out, orange locks in; told apart with any colour vision.
_MAP = LinearSegmentedColormap.from_list("collusion", (COLOURS[1], "#f4f4f4", COLOURS[0]))


def plot_phase(model: str, panels: Sequence[Panel]) -> bytes:
    """Panels in rows of two -> PNG, the same bytes for the same panels.

    Colour is the collusion rate of the last round, of the run's own cells (circles) as of the fitted policy. The
    dashed line is where it equals the initial rate: what begins below it rises, what begins above it falls.
    """
    rows = -(-len(panels) // 2)
    height = 1.0 + PANEL * rows  # inches, as all that is divided by it
    with matplotlib.style.context("default"):  # whatever a matplotlibrc of this machine says
        figure = Figure(figsize=(10, height), dpi=160)
        for index, panel in enumerate(panels):
            left, bottom = 0.075 + 0.425 * (index % 2), (PANEL * (rows - 1 - index // 2) + 0.65) / height
            axes = figure.add_axes((left, bottom, 0.37, 3.0 / height))
            drawn = _panel(axes, panel)
            if index % 2 == 0:
                axes.set_ylabel("collusion rate in round 1", fontsize=9.5, color=INK)
        bar = figure.colorbar(drawn, cax=figure.add_axes((0.915, 0.65 / height, 0.016, 3.0 / height)))
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.ax.tick_params(length=0, labelsize=9, labelcolor=INK)
        figure.text(
            0.03, 1 - 0.45 / height, f"Threshold game, {model}: collusion rate in the last round", fontsize=15,
            fontweight="bold", color=INK, parse_math=False,
        )  # fmt: skip
        below = "colour: policy fitted to the run  ·  circles: the run itself  ·  below the dashed line it rises"
        figure.text(0.03, 1 - 0.75 / height, below, fontsize=10, color=FAINT)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(axes, panel: Panel):
    """Draws one diagram; returns what a colour bar needs."""
    last, initial = np.array(panel.last_rates), np.array(panel.initial_rates)
    drawn = axes.pcolormesh(panel.shares, initial, last, cmap=_MAP, vmin=0, vmax=1, shading="nearest", rasterized=True)
    change = last - initial[:, None]
    if min(change.shape) > 1 and change.min() < 0 < change.max():
        axes.contour(panel.shares, initial, change, levels=[0], colors=INK, linewidths=1.2, linestyles="--")
    for share, first, rate in panel.points:
        axes.scatter(
            share, first, c=[rate], cmap=_MAP, vmin=0, vmax=1, s=150, edgecolors="white", linewidths=2, zorder=3,
            clip_on=False,
        )  # fmt: skip
        axes.scatter(share, first, s=185, facecolors="none", edgecolors=INK, linewidths=0.8, zorder=4, clip_on=False)
    axes.set_title(_title(panel), fontsize=10.5, color=INK, loc="left")
    axes.set_xlabel("threshold, share of the agents (t/N)", fontsize=9.5, color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    return drawn


def _title(panel: Panel) -> str:
    high, normal, low = panel.payoffs
    kind = "additive" if panel.additive else "factors"
    paid = "" if panel.everyone else ", paid to choosers"
    return f"{panel.agents} agents, {panel.rounds} rounds, {kind} {high:g} / {normal:g} / {low:g}{paid}"


# ---------------------------------------------------------------- the command


class Condition(NamedTuple):
    """One cell of a finished run. `records` are those of the model's own choices."""

    setting: dict
    records: list[dict]
    pure: bool  # all agents chose, by this model: none is a fixed cooperator or wears another adapter


def read_run(run: Path) -> dict[str, list[Condition]]:
    """The conditions without a control, by model. Records know their condition, and whether capital adds up."""
    results = read_json(run / "results.json")
    if results is None:
        raise UserError(f"{run} holds no results.json: is it the workdir of a finished run?")
    if results.get("testbed") != "threshold_game":
        raise UserError(f"{run} is a run of {results.get('testbed')}, not of the threshold game")
    models: dict[str, list[Condition]] = {}
    for condition in results["conditions"]:
        if condition["control"] == "none":
            models.setdefault(condition["model"], []).append(_read_condition(run, condition))
    if not models:
        raise UserError(f"{run} has no condition without a control")
    return models


def _read_condition(run: Path, condition: Mapping) -> Condition:
    path = run / "evolve" / condition["name"] / "episodes.jsonl"
    records = read_lines(path)
    if not records:
        raise UserError(f"{path} holds no records")
    setting = condition["setting"]
    known = {"condition": condition["name"], "additive": setting.get("game.mode") == "additive"}
    own = [r | known for r in records if not (r.get("fixed") or r.get("unaligned"))]
    return Condition(setting, own, len(own) == len(records))


def panels(weights: np.ndarray, conditions: Sequence[Condition]) -> list[Panel]:
    """For each kind of game in the run a diagram of its own size, with points, and one of large games.

    Only conditions that are pure: those of the policy alone.
    """
    kinds: dict[tuple, list[list[float]]] = {}
    for setting, records, pure in conditions:
        if pure:
            agents, rounds = setting["game.agents"], max(r["round"] for r in records)
            payoffs = tuple(float(factor) for factor in setting["game.payoffs"])
            rates = (_rate(records, number) for number in (1, rounds))
            kind = agents, payoffs, records[0]["additive"], setting.get("game.success_applies_to_all", True), rounds
            kinds.setdefault(kind, []).append([setting["game.threshold"] / agents, *rates])
    drawn = []
    for (own, payoffs, additive, everyone, rounds), points in kinds.items():
        for agents, shown in ((own, points), (LARGE, [])):
            steps = min(agents, 16)
            shares, initial = np.arange(1, steps + 1) / steps, np.linspace(0, 1, RATES)
            games, key = max(1, AGENTS // agents), jax.random.key(0)
            last = phase_diagram(weights, shares, initial, agents, games, rounds, payoffs, key, additive, everyone)
            grid = shares.tolist(), initial.tolist(), np.asarray(last, float).tolist()
            drawn.append(Panel(agents, payoffs, additive, everyone, rounds, *grid, shown))
    return drawn


def _rate(records: Sequence[Mapping], number: int) -> float:
    """Collusion rate of a round."""
    return float(np.mean([r["decision"] == "violate" for r in records if r["round"] == number]))


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    run, out = flags.FLAGS.run, flags.FLAGS.out
    try:
        if not run or not out:
            raise UserError("--run (the workdir of a finished run) and --out (a folder to write to) are needed")
        found = []
        for model, conditions in read_run(Path(run)).items():
            fitted = fit([record for condition in conditions for record in condition.records])
            found.append((model, fitted, panels(fitted.weights, conditions)))
        write(Path(out), found)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: cannot write {out}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def write(out: Path, found: Sequence[tuple[str, Fit, list[Panel]]]) -> None:
    """population.json and a phase-MODEL.png each; one line a model on the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    models = []
    for model, fitted, drawn in found:
        if drawn:
            (out / f"phase-{model}.png").write_bytes(plot_phase(model, drawn))
        told = fitted._asdict() | {key: getattr(fitted, key).tolist() for key in ("weights", "standard_errors")}
        models.append({"model": model, "fit": told, "phase": [dataclasses.asdict(panel) for panel in drawn]})
        terms = zip(fitted.names, fitted.weights, fitted.standard_errors, strict=True)
        print(f"{model}:", ", ".join(f"{name} {weight:+.2f} (se {error:.2f})" for name, weight, error in terms))
    write_json(out / "population.json", json.loads(json.dumps({"schema": 1, "models": models})))


if __name__ == "__main__":
    flags.DEFINE_string("run", "", "workdir of a finished run of the threshold game")
    flags.DEFINE_string("out", "", "folder for population.json and the pictures")
    app.run(main)
