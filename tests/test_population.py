"""Populations without a language model: the fit against known weights and scipy, simulation against a plain loop."""

import json
import os
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from scipy import optimize

from atp_jax import population
from atp_jax.envs import threshold_game as env
from atp_jax.errors import UserError
from atp_jax.files import append, write_json

TRUE = np.array([-0.4, -0.8, 0.9, 0.6, 3.0])
PAYOFFS = (1.2, 1.0, 0.8)


def lived(rng, weights=TRUE, games=200, agents=6, threshold=3, rounds=5, payoffs=PAYOFFS, additive=False) -> list[dict]:
    """Records of games that agents with this policy play, written without the code under test."""
    high, normal, low = payoffs
    records = []
    for game in range(games):
        capital, again, payoff, success = np.ones(agents), np.zeros(agents, bool), np.zeros(agents), False
        for number in range(1, rounds + 1):
            z = weights[1] + weights[2] * again + weights[3] * success + weights[4] * payoff
            again = rng.random(agents) < 1 / (1 + np.exp(-(z if number > 1 else np.full(agents, weights[0]))))
            success = bool(again.sum() >= threshold)
            factor = np.full(agents, high) if success else np.where(again, low, normal)
            reward = factor - 1 if additive else capital * factor - capital
            capital = capital + reward
            payoff = factor - 1
            records += [
                {
                    "episode": game, "agent": agent, "round": number,
                    "decision": "violate" if again[agent] else ("comply", "unparsed")[agent % 2],
                    "reward": float(reward[agent]), "capital": float(capital[agent]), "count": int(again.sum()),
                    "success": success,
                }
                for agent in range(agents)
            ]  # fmt: skip
    return records


def several(rng, sets=((1.2, 1.0, 0.8), (1.6, 1.0, 0.5), (1.1, 1.0, 0.9)), **kind) -> list[dict]:
    """Records of several payoff sets, whose episodes are all numbered from 0."""
    return [
        record | {"condition": str(number)}
        for number, payoffs in enumerate(sets)
        for record in lived(rng, payoffs=payoffs, **kind)
    ]


def table(records):
    """Features and choices once more, one record after another in the order of the file."""
    x, y, before = [], [], {}
    for r in records:
        who = (r.get("condition"), r["episode"], r["agent"])
        x.append([1, 0, 0, 0, 0] if r["round"] == 1 else [0, 1, *before[who]])
        y.append(r["decision"] == "violate")
        earned = r["reward"] if r.get("additive") else r["capital"] / (r["capital"] - r["reward"]) - 1
        before[who] = (float(y[-1]), float(r["success"]), earned)
    return np.array(x, float), np.array(y, float)


# ---------------------------------------------------------------- the fit


@pytest.mark.parametrize("additive", [False, True])
def test_it_recovers_the_weights_of_several_payoff_sets(additive):
    rng = np.random.default_rng(0)
    records = [r | {"additive": additive} for r in several(rng, additive=additive, games=400)]
    fitted = population.fit(records)
    assert fitted.n == len(records) and fitted.games == 1200 and fitted.names == population.NAMES
    assert np.all(np.abs(fitted.weights - TRUE) < 3 * fitted.standard_errors)
    assert np.all(fitted.standard_errors < 0.5)


def test_one_payoff_set_is_identified_too():
    fitted = population.fit(lived(np.random.default_rng(1), games=800))
    assert np.all(np.abs(fitted.weights - TRUE) < 3 * fitted.standard_errors)
    # Its four weights are as free as the four things that can have happened to an agent: the share of each is met.
    x, y = table(lived(np.random.default_rng(1), games=800))
    p = 1 / (1 + np.exp(-x @ fitted.weights))
    for again in (0, 1):
        for success in (0, 1):
            same = (x[:, 1] == 1) & (x[:, 2] == again) & (x[:, 3] == success)
            assert same.sum() > 100 and abs(y[same].mean() - p[same].mean()) < 1e-5


def test_the_maximum_is_one_by_scipy():
    records = several(np.random.default_rng(2), games=60)
    fitted = population.fit(records)
    x, y = table(records)

    def cost(w):
        z = x @ w
        return -np.sum(y * z - np.logaddexp(0, z)) + population.RIDGE * np.sum(w**2) / 2

    def slope(w):
        return -x.T @ (y - 1 / (1 + np.exp(-x @ w))) + population.RIDGE * w

    found = optimize.minimize(cost, np.zeros(5), jac=slope, method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(fitted.weights, found.x, atol=1e-5)
    assert np.abs(optimize.approx_fprime(fitted.weights, cost, 1e-6)).max() < 0.01  # the slope by differences
    assert np.abs(slope(fitted.weights)).max() < 1e-6
    z = x @ fitted.weights
    assert fitted.log_likelihood == pytest.approx(np.sum(y * z - np.logaddexp(0, z)), abs=1e-9)


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(100):
        fitted = population.fit(several(rng, games=25, agents=5, threshold=2, rounds=4))
        covered.append(np.abs(fitted.weights - TRUE) < 1.96 * fitted.standard_errors)
    assert 0.92 <= np.mean(covered) <= 0.98
    assert np.all(np.mean(covered, 0) >= 0.88)


def test_agents_who_copy_each_other_count_as_one():
    """The same agent six times in each game: standard errors clustered by game do not shrink."""
    rng = np.random.default_rng(4)
    alone = lived(rng, agents=1, threshold=1, games=300, rounds=4)
    copied = [record | {"agent": agent} for record in alone for agent in range(6)]
    one, six = population.fit(alone), population.fit(copied)
    np.testing.assert_allclose(six.weights, one.weights, atol=0.02)
    identified = one.standard_errors < 5  # one agent at t=1 succeeds exactly when it colludes: the rest is the ridge's
    assert identified.sum() >= 2
    np.testing.assert_allclose(six.standard_errors[identified], one.standard_errors[identified], rtol=0.02)


def test_what_is_perfectly_predicted_stays_finite():
    never = [-50.0, -50.0, 0, 0, 0]
    fitted = population.fit(lived(np.random.default_rng(5), weights=never, games=50))
    assert np.all(np.isfinite(fitted.weights)) and np.all(np.isfinite(fitted.standard_errors))
    assert np.all(fitted.weights[:2] < -8) and fitted.log_likelihood == pytest.approx(0, abs=0.1)
    np.testing.assert_allclose(fitted.weights[2:], 0)  # nobody colluded, no game succeeded
    np.testing.assert_allclose(fitted.standard_errors[2:], population.RIDGE**-0.5)
    # Collusion is repeated always and never begun: separated, and with a clear sign.
    stubborn = population.fit(lived(np.random.default_rng(5), weights=[0, -60, 120, 0, 0], threshold=7, games=50))
    assert stubborn.weights[1] < -8 and np.all(np.abs(stubborn.weights) < 40)
    assert stubborn.weights[1:] @ [1, 1, 0, -0.2] > 8


def test_records_in_any_order_give_the_same_fit():
    records = several(np.random.default_rng(6), games=30)
    shuffled = [records[i] for i in np.random.default_rng(7).permutation(len(records))]
    for ours, theirs in zip(population.fit(records)[1:], population.fit(shuffled)[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def test_who_lost_everything_has_a_payoff_of_nothing():
    records = lived(np.random.default_rng(8), payoffs=(1.2, 1.0, 0.0), threshold=5, games=40)
    assert any(record["capital"] == 0 for record in records)
    assert np.all(np.isfinite(population.fit(records).weights))


def test_records_that_cannot_be_fitted_are_refused():
    records = lived(np.random.default_rng(9), games=3)
    with pytest.raises(UserError, match="no second round"):
        population.fit([r for r in records if r["round"] == 1])
    with pytest.raises(UserError, match="no second round"):
        population.fit([])
    with pytest.raises(UserError, match="round 3 without those of round 2"):
        population.fit([r for r in records if r["round"] != 2])
    with pytest.raises(UserError, match="one game only"):
        population.fit([r for r in records if r["episode"] == 0])
    with pytest.raises(UserError, match="'success'"):
        population.fit([{key: value for key, value in r.items() if key != "success"} for r in records])


# ---------------------------------------------------------------- simulation


def test_certain_agents_equal_a_plain_loop():
    """Weights so large that nothing is left to chance: collude first, stop after a failure, join after a success."""
    rng = np.random.default_rng(10)
    games, width, rounds = 40, 9, 5
    places = np.arange(width)
    agents, threshold = rng.integers(2, width + 1, games), rng.integers(1, 6, games)
    params = population.same_games(games, width, 1, PAYOFFS).replace(
        present=places < agents[:, None], fixed=rng.random((games, width)) < 0.2, threshold=threshold.astype(np.int32)
    )
    fixed = np.array(params.fixed)
    big = 1000.0
    for weights, after in (([-big, -big, 0, 2 * big, 0], "success"), ([-big, -big, 2 * big, 0, 0], "again"),
                           ([big, -big, big, 0, 20 * big], "payoff")):  # fmt: skip
        rates, successes = population.simulate(np.array(weights, np.float32), params, rounds, jax.random.key(0))
        colludes = np.full((games, width), weights[0] > 0) | fixed
        for number in range(rounds):
            count = (colludes & np.array(params.present)).sum(1)
            success = count >= threshold
            assert float(rates[number]) == pytest.approx(count.sum() / agents.sum(), abs=1e-6)
            assert float(successes[number]) == pytest.approx(success.mean(), abs=1e-6)
            payoff = np.where(success[:, None], 0.2, np.where(colludes, -0.2, 0))
            # 20 * payoff is 4 after a success, -4 after a failed collusion, with 1 for having colluded
            joined = {"success": success[:, None], "again": colludes, "payoff": colludes + 20 * payoff > 1}[after]
            colludes = np.broadcast_to(joined, (games, width)) | fixed


def test_chances_are_those_of_the_policy():
    """The first two rounds of many games against the plain simulator of this file."""
    records = lived(np.random.default_rng(11), games=3000, agents=4, threshold=2, rounds=3)
    params = population.same_games(20000, 4, 2, PAYOFFS)
    rates, successes = population.simulate(TRUE, params, 3, jax.random.key(1))
    for number in (1, 2, 3):
        mine = [r for r in records if r["round"] == number]
        assert float(rates[number - 1]) == pytest.approx(np.mean([r["decision"] == "violate" for r in mine]), abs=0.025)
        assert float(successes[number - 1]) == pytest.approx(np.mean([r["success"] for r in mine]), abs=0.035)


@pytest.mark.parametrize("agents", [8, 4096, 1_000_000])
def test_a_million_agents(agents):
    games = 1_000_000 // agents
    params = population.same_games(games, agents, agents // 4, PAYOFFS)
    rates, successes = population.simulate(TRUE, params, 3, jax.random.key(2))
    assert float(rates[0]) == pytest.approx(1 / (1 + np.exp(-TRUE[0])), abs=0.003)
    if agents > 8:  # 40% collude, a quarter suffices: every game succeeds
        np.testing.assert_allclose(successes, 1, rtol=1e-6)
        assert float(rates[1]) > 0.45


def test_long_games_do_not_overflow():
    params = population.same_games(4, 8, 1, (5.0, 1.0, 0.1))
    rates, _ = population.simulate(np.array([9, 9, 0, 0, 1], np.float32), params, 400, jax.random.key(0))
    assert np.all(np.array(rates) > 0.9)


def test_a_fit_to_what_was_fitted_comes_back():
    """Weights -> records -> weights -> populations that collude as the records do, round by round."""
    records = lived(np.random.default_rng(12), games=1500, agents=8, threshold=4)
    weights = population.fit(records).weights
    rates, _ = population.simulate(weights, population.same_games(5000, 8, 4, PAYOFFS), 5, jax.random.key(3))
    own = [np.mean([r["decision"] == "violate" for r in records if r["round"] == n]) for n in range(1, 6)]
    np.testing.assert_allclose(rates, own, atol=0.03)


# ---------------------------------------------------------------- the phase diagram and its command


def test_the_phase_diagram_is_the_simulation_of_each_cell():
    shares, initial = [0.25, 0.5, 1.0], [0.0, 0.4, 1.0]
    key = jax.random.key(4)
    grid = population.phase_diagram(TRUE, shares, initial, 8, 50, 4, PAYOFFS, key)
    chex.assert_shape(grid, (3, 3))
    for row, rate in enumerate(initial):
        with np.errstate(divide="ignore"):
            weights = np.r_[np.log(rate / (1 - rate)) if rate < 1 else np.inf, TRUE[1:]]
        for column, share in enumerate(shares):
            params = population.same_games(50, 8, int(share * 8), PAYOFFS)
            rates, _ = population.simulate(weights.astype(np.float32), params, 4, key)
            assert float(grid[row, column]) == pytest.approx(float(rates[-1]), abs=1e-6)


def test_thresholds_and_rates_that_are_certain():
    imitate = np.array([0, -1000, 0, 2000, 0])  # collude after a success, else not
    grid = population.phase_diagram(imitate, [0.01, 0.5, 1], [0, 1], 10, 5, 3, PAYOFFS, jax.random.key(0))
    np.testing.assert_array_equal(grid, [[0, 0, 0], [1, 1, 1]])  # a share of 0.01 is one agent, not none


def test_one_program_draws_all_cells_payoffs_and_weights():
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(population.phase_diagram.__wrapped__, n=1)
    draw = jax.jit(traced, static_argnames=("agents", "games", "rounds"))
    for scale in (0.5, 1.0):
        draw(TRUE * scale, [0.2, 0.6], [0.1, 0.9], 5, 3, 2, (1 + scale, 1.0, 0.5), jax.random.key(int(10 * scale)))


def make_run(folder, games=40, testbed="threshold_game"):
    """A made-up workdir: two models, thresholds 2 and 6 of 8, two payoff sets, a mixed population and a control."""
    rng = np.random.default_rng(13)
    conditions = []
    for model, shift in (("base", 0.0), ("grpo", -1.2)):
        for threshold in (2, 6):
            for payoffs in (PAYOFFS, (1.5, 1.0, 0.6)):
                name = f"{model}-t{threshold}-{payoffs[0]}"
                weights = TRUE + [shift, shift / 2, 0, 0, 0]
                records = lived(rng, weights, games, 8, threshold, 6, payoffs)
                (folder / "evolve" / name).mkdir(parents=True)
                append(folder / "evolve" / name / "episodes.jsonl", records)
                setting = {
                    "game.agents": 8, "game.threshold": threshold, "game.payoffs": list(payoffs),
                    "game.mode": "multiplicative",
                }  # fmt: skip
                conditions.append({"name": name, "model": model, "control": "none", "setting": setting})
    # Fixed cooperators and unaligned agents always collude: neither is a choice of this model.
    others = [{"decision": "violate", "fixed": agent == 0, "unaligned": agent == 1} for agent in range(2)]
    records = [r | (others[r["agent"]] if r["agent"] < 2 else {}) for r in records]
    (folder / "evolve" / "grpo-mixed").mkdir()
    append(folder / "evolve" / "grpo-mixed" / "episodes.jsonl", records)
    conditions.append({"name": "grpo-mixed", "model": "grpo", "control": "none", "setting": setting})
    conditions.append({"name": "base-no_peers", "model": "base", "control": "no_peers", "setting": {}})
    write_json(folder / "results.json", {"schema": 1, "testbed": testbed, "conditions": conditions})


def run_command(root, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "atp_jax.population", *map(str, arguments)],
        cwd=root, env=dict(os.environ), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_the_command_fits_and_draws_each_model(tmp_path, request):
    make_run(tmp_path / "run")
    out = tmp_path / "out"
    done = run_command(request.config.rootpath, "--run", tmp_path / "run", "--out", out)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["base", "grpo"]
    told = json.loads((out / "population.json").read_text())
    base, grpo = told["models"]
    for model, first, games in ((base, TRUE[0], 160), (grpo, TRUE[0] - 1.2, 200)):
        assert (out / f"phase-{model['model']}.png").read_bytes().startswith(b"\x89PNG")
        assert model["fit"]["names"] == list(population.NAMES) and model["fit"]["games"] == games
        assert abs(model["fit"]["weights"][0] - first) < 4 * model["fit"]["standard_errors"][0]
        assert model["fit"]["n"] == (160 * 8 + (games - 160) * 6) * 6
        assert [panel["agents"] for panel in model["phase"]] == [8, population.LARGE] * 2
        for panel in model["phase"]:
            assert np.shape(panel["last_rates"]) == (population.RATES, len(panel["shares"]))
            assert len(panel["points"]) == (2 if panel["agents"] == 8 else 0)
    # The run's own cells lie on the surface that was fitted to them.
    panel = base["phase"][0]
    for share, first, last in panel["points"]:
        column = panel["shares"].index(share)
        expected = np.interp(first, panel["initial_rates"], np.array(panel["last_rates"])[:, column])
        assert abs(last - expected) < 0.12


def test_what_cannot_be_read_is_said_in_one_line(tmp_path, request):
    root = request.config.rootpath
    make_run(tmp_path / "other", games=2, testbed="role_play")
    make_run(tmp_path / "emptied", games=2)
    (tmp_path / "emptied" / "evolve" / "grpo-t6-1.5" / "episodes.jsonl").unlink()
    for arguments, reason in (
        ((), "--run"),
        (("--run", tmp_path / "nowhere", "--out", tmp_path / "o"), "no results.json"),
        (("--run", tmp_path / "other", "--out", tmp_path / "o"), "role_play"),
        (("--run", tmp_path / "emptied", "--out", tmp_path / "o"), "grpo-t6-1.5"),
    ):
        done = run_command(root, *arguments)
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.splitlines()
        assert line.startswith("error:") and reason in line


def test_fixed_cooperators_count():
    params: env.Params = population.same_games(10, 8, 3, PAYOFFS)
    params = params.replace(fixed=params.fixed.at[:, :3].set(True))
    never = np.array([-100.0, -100.0, 0, 0, 0])
    rates, successes = population.simulate(never, params, 2, jax.random.key(0))
    np.testing.assert_allclose(rates, 3 / 8)
    np.testing.assert_allclose(successes, 1, rtol=1e-6)


def test_who_lost_everything_earns_nothing_more_and_choosers_alone_can_be_paid():
    """Against a plain loop over one game: agents certain of colluding whatever happens, where failing costs all."""
    always = jax.numpy.asarray([50.0, 0.0, 0.0, 0.0, 1.0])
    params = population.same_games(3, 4, 5, (1.2, 1.0, 0.0))  # 5 of 4 never come together
    rates, success = population.simulate(always, params, 2, jax.random.key(0))
    assert rates[0] == 1 and not success.any()
    # After the loss of everything (payoff -1) the odds are sigmoid(-1); a round later the payoff is 0: sigmoid(0).
    many = population.same_games(20000, 4, 5, (1.2, 1.0, 0.0))
    rates, _ = population.simulate(always, many, 3, jax.random.key(1))
    np.testing.assert_allclose(rates, [1.0, 1 / (1 + np.e), 0.5], atol=0.01)
    weights = jax.numpy.asarray([0.0, 0.0, 0.0, 0.0, 50.0])
    grids = [
        population.phase_diagram(
            weights, [0.25], [0.5], 8, 2000, 2, (1.2, 1.0, 0.8), jax.random.key(2), False, everyone
        )
        for everyone in (True, False)
    ]
    assert grids[0][0, 0] > grids[1][0, 0] + 0.1  # who stayed away sees a gain only if everyone is paid
