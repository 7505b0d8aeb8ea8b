"Scaling: planted laws come back, flat data are called flat, fronts and volumes are right in any number of axes."
import numpy as np
import pytest

from mmqlora.core import InputError
from mmqlora.scaling import Law, fit_law, flatness, hypervolume, largest, pareto_front, pareto_set, power_law, scaling_fit

SIZES = 2.**np.arange(8)
GRID = np.array([(x, d) for x in (1e3, 1e4, 1e5, 1e6) for d in (100, 400, 1600, 6400)])


def noisy(law, x, noise, seeds, seed): return law(x)[:, None]*np.exp(np.random.default_rng(seed).normal(0, noise, (len(x), seeds)))


@pytest.mark.parametrize("law", [Law((1.5,), (.7,), .3), Law((.2,), (.1,), .05), Law((3.,), (2.,), 1.)])
def test_a_law_without_noise_comes_back(law):
    found = fit_law(SIZES, law(SIZES))
    assert found(SIZES*10) == pytest.approx(law(SIZES*10), rel=1e-3)
    assert found.a == pytest.approx(law.a, abs=.01)


def test_a_law_of_two_axes_comes_back_in_any_unit():
    law = Law((8., 5.), (.25, .35), .4)
    for unit in (1., 2**20): assert fit_law(GRID*unit, law(GRID)).a == pytest.approx(law.a, abs=1e-3)


def test_one_run_that_went_wrong_does_not_move_the_law():
    law = Law((8., 5.), (.25, .35), .4)
    losses = law(GRID); losses[5] *= 3
    assert fit_law(GRID, losses).a == pytest.approx(law.a, abs=.01)


def test_the_planted_exponent_lies_in_its_interval():
    law = Law((1.5,), (.6,), .3)
    intervals = [scaling_fit(SIZES, noisy(law, SIZES, .02, 3, seed), n=40, seed=seed).exponent_ci() for seed in range(12)]
    assert sum(low < .6 < high for low, high in intervals) >= 9
    assert all(high - low < .3 for low, high in intervals)


def test_both_planted_exponents_lie_in_their_intervals():
    fit = scaling_fit(GRID, noisy(Law((8., 5.), (.25, .35), .4), GRID, .005, 3, 1), n=60)
    for axis, a in enumerate((.25, .35)):
        low, high = fit.exponent_ci(axis)
        assert low < a < high
    assert [flatness(fit, i)["verdict"] for i in (0, 1)] == ["falls", "falls"]


def test_the_held_out_points_are_the_largest_and_not_fitted():
    assert largest(SIZES).tolist() == [False]*7 + [True]
    assert GRID[largest(GRID)].tolist()[-1] == [1e6, 6400] and largest(GRID).sum() < 5
    losses = Law((1.5,), (.6,), .3)(SIZES); wrong = losses.copy(); wrong[-1] *= 5
    assert scaling_fit(SIZES, wrong, n=5).law == scaling_fit(SIZES, losses, n=5).law
    assert scaling_fit(SIZES, wrong, n=5).error == pytest.approx(np.log(5), rel=.01)


def test_a_good_law_predicts_the_held_out_size_better_than_a_constant():
    fit = scaling_fit(SIZES, noisy(Law((1.5,), (.6,), .3), SIZES, .01, 5, 2), n=60)
    assert fit.error < .03 < fit.constant_error
    low, high = fit.band(SIZES[-1:])[0]
    assert low < Law((1.5,), (.6,), .3)(SIZES[-1:])[0] < high


@pytest.mark.parametrize("seeds", (1, 3))
def test_planted_flat_data_are_called_flat(seeds):
    flat = [flatness(scaling_fit(SIZES, .5*np.exp(np.random.default_rng(s).normal(0, .02, (8, seeds))), n=20)) for s in range(6)]
    assert sum(f["verdict"] == "flat" for f in flat) >= 5
    assert all(abs(f["change"]) < .06 for f in flat)


def test_an_axis_that_does_nothing_is_flat_beside_one_that_does():
    fit = scaling_fit(GRID, noisy(lambda x: Law((5.,), (.35,), .4)(x[:, 1]), GRID, .01, 3, 3), n=40)
    assert flatness(fit, 1)["verdict"] == "falls" and flatness(fit, 0)["verdict"] == "flat"


def test_gains_that_the_largest_size_does_not_continue_level_off():
    "Half of the loss gone at 64, and as bad at 128 as at 8: a law of the smaller sizes misleads, and the verdict says so."
    losses = Law((1.5,), (.3,), .01)(SIZES); losses[-1] = losses[3]
    flat = flatness(scaling_fit(SIZES, losses, n=20))
    assert flat["verdict"] == "levels off" and not flat["beats_constant"] and flat["change_ci95"][1] < 0


def test_a_loss_that_grows_rises():
    assert flatness(scaling_fit(SIZES, noisy(lambda x: .5*x**.1, SIZES, .01, 3, 4), n=20))["verdict"] == "rises"


def test_seeds_that_are_missing_are_left_out():
    losses = noisy(Law((1.5,), (.6,), .3), SIZES, .01, 3, 5); losses[2, 1] = np.nan
    fit = scaling_fit(SIZES, losses, n=5)
    assert len(fit.y) == 23 and fit.held.sum() == 3 and set(fit.record()) >= {"A", "a", "E", "a_ci95", "error", "constant_error"}


@pytest.mark.parametrize("x, y, held, problem", [
    ([1, 2, 3], [1, 1, 1], None, "cannot fix 3 parameters"), ([0, 1, 2, 3, 4], [1]*5, None, "sizes must be positive"), ([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, -1, 1], None, "positive losses"),
    ([1, 2, 3, 4, 5], [1]*4, None, "4 losses for 5 sizes"), ([1, 2, 3, 4, 5], [1]*5, [True]*5, "some points to fit"), ([1, 2, 3, 4, 5], [1]*5, [True], "1 for 5 points")])
def test_what_cannot_be_fitted_is_said(x, y, held, problem):
    with pytest.raises(InputError, match=problem): scaling_fit(x, y, held)


def test_a_front_of_one_axis_is_that_of_pareto_front():
    rng = np.random.default_rng(6)
    cost, quality = rng.random(30), rng.random(30)
    assert sorted(pareto_set(cost, quality)) == sorted(pareto_front(cost, quality))


def test_no_run_on_a_front_of_three_costs_is_beaten_and_every_other_is():
    rng = np.random.default_rng(7)
    costs, quality = rng.integers(0, 4, (40, 3)).astype(float), rng.integers(0, 4, 40).astype(float)
    def beats(i, j): return (costs[i] <= costs[j]).all() and quality[i] >= quality[j] and ((costs[i] < costs[j]).any() or quality[i] > quality[j])
    front = pareto_set(costs, quality)
    for j in range(40): assert (j in front) == (not any(beats(i, j) for i in range(40)))


@pytest.mark.parametrize("axes", (1, 2, 3))
def test_the_hypervolume_is_what_darts_find(axes):
    rng = np.random.default_rng(8)
    costs, quality = rng.random((10, axes)), rng.random(10)
    darts, want = rng.random((60000, axes)), rng.random(60000)
    hit = np.mean([(costs[:, None] <= darts[None]).all(2)[i] & (want <= quality[i]) for i in range(10)], 0) > 0
    assert hypervolume(costs, quality, np.ones(axes)) == pytest.approx(hit.mean(), abs=.01)


def test_the_hypervolume_grows_with_a_better_run_only():
    costs, quality = [[1., 2.], [2., 1.]], [.5, .5]
    before = hypervolume(costs, quality, [4, 4])
    assert hypervolume([*costs, [3, 3]], [*quality, .4], [4, 4]) == before
    assert hypervolume([*costs, [3, 3]], [*quality, .6], [4, 4]) > before
    assert hypervolume([[5, 5]], [.9], [4, 4]) == 0


def test_power_law_still_fits_what_it_did():
    assert power_law(SIZES, .3 + 1.5*SIZES**-.7)["b"] == pytest.approx(.7, abs=.02)
