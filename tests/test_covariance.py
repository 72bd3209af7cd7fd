"""Estimators of the population's covariance: formulas and bits, and that an error changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

import batchnorm as bn

CHANNELS, GROUPS = 6, 2
ESTIMATORS = {
    "moving": lambda: bn.MovingCovariance(update_weight=0.3),
    "pooled": lambda: bn.PooledCovariance(),
}


@pytest.fixture(params=ESTIMATORS)
def make(request):
    return ESTIMATORS[request.param]


def rows(rng, sizes, mean=0.0):
    mixed = rng.standard_normal((CHANNELS, CHANNELS))
    return [rng.standard_normal((size, CHANNELS)) @ mixed + mean for size in sizes]


def batches(rng, sizes):
    return [bn.comoments(x, groups=GROUPS) for x in rows(rng, sizes)]


def state_bits(population):
    return {name: array.tobytes() for name, array in population.state_dict().items()}


def test_moving_covariance_is_the_formula_bit_for_bit(rng):
    w, size = 0.3, CHANNELS // GROUPS
    population = bn.MovingCovariance(update_weight=w)
    mean, cov = np.zeros(CHANNELS), np.stack([np.eye(size)] * GROUPS)
    for s in batches(rng, (5, 2, 60, 7)):
        population.update(s)
        mean, cov = (1 - w) * mean + w * s.mean, (1 - w) * cov + w * s.cov_unbiased
        assert population.mean.tobytes() == mean.tobytes()
        assert population.cov.tobytes() == cov.tobytes()
    assert bn.MovingCovariance().update_weight == 0.1


def test_one_channel_a_group_is_the_moving_average_of_variances(rng):
    ours, theirs = bn.MovingCovariance(update_weight=0.3), bn.MovingAverage(update_weight=0.3)
    for x in rows(rng, (9, 60, 7)):
        s = bn.comoments(x, groups=CHANNELS)
        ours.update(s)
        theirs.update(s.moments)
    np.testing.assert_array_equal(ours.mean, theirs.mean)
    np.testing.assert_array_equal(ours.cov.ravel(), theirs.var)


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_pooled_covariance_is_that_of_all_rows(rng, mean):
    """Batches of any sizes, with other means each."""
    parts = [x + k for k, x in enumerate(rows(rng, (2, 60, 7, 1000, 3), mean))]
    population = bn.PooledCovariance()
    for x in parts:
        population.update(bn.comoments(x))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(population.mean, whole.mean(0), rtol=1e-14, atol=1e-13)
    cov = np.cov((whole - mean).T)
    np.testing.assert_allclose(population.cov[0], cov, atol=1e-9 * abs(cov).max() if mean else 1e-13)


def test_unbiased(rng):
    """Over many small batches of known Λ, both give Λ, which the average of S/m would miss by a third."""
    true = np.array([[2.0, 1.0], [1.0, 3.0]])
    x = rng.standard_normal((8000, 3, 2)) @ np.linalg.cholesky(true).T
    moving, pooled = bn.MovingCovariance(update_weight=0.002), bn.PooledCovariance()
    for batch in x:
        s = bn.comoments(batch)
        moving.update(s)
        pooled.update(s)
    np.testing.assert_allclose(moving.cov[0], true, atol=0.4)
    np.testing.assert_allclose(pooled.cov[0], true, atol=0.1)


@pytest.mark.parametrize("weight", [0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_update_weight_range(weight):
    with pytest.raises(ValueError, match="update_weight: was"):
        bn.MovingCovariance(update_weight=weight)


@pytest.mark.parametrize("weight", ["0.1", None, True, 1j])
def test_update_weights_that_are_no_numbers(weight):
    with pytest.raises(TypeError, match=r"^update_weight: was .*, wanted a number"):
        bn.MovingCovariance(weight)


def test_not_ready_until_the_first_batch_and_after_reset(rng, make):
    population = make()
    for _ in range(2):
        assert not population.ready
        assert population.state_dict() == {}
        for name in ("mean", "cov"):
            with pytest.raises(ValueError, match="has seen no batch"):
                getattr(population, name)
        population.update(batches(rng, (9,))[0])
        assert population.ready
        assert population.mean.shape == (CHANNELS,)
        assert population.cov.shape == (GROUPS, CHANNELS // GROUPS, CHANNELS // GROUPS)
        assert (population.cov == population.cov.transpose(0, 2, 1)).all()
        assert population.mean.dtype == population.cov.dtype == np.float64
        population.reset()


def test_state_travels_with_every_bit(rng, make):
    one, other, parts = make(), make(), batches(rng, (5, 60, 2, 9))
    other.update(bn.comoments(rng.normal(size=(4, 3))))  # what a load replaces, channels and all
    for s in parts[:2]:
        one.update(s)
    other.load_state_dict(one.state_dict())
    assert state_bits(other) == state_bits(one)
    for s in parts[2:]:
        one.update(s)
        other.update(s)
    assert state_bits(other) == state_bits(one)
    one.load_state_dict({})
    assert not one.ready


def test_nothing_that_is_handed_out_or_taken_in_is_shared(rng, make):
    population = make()
    population.update(batches(rng, (9,))[0])
    before, state = state_bits(population), population.state_dict()
    population.mean[:] = 7
    population.cov[:] = 7
    for array in population.state_dict().values():
        array[...] = 7
    assert state_bits(population) == before
    population.load_state_dict(state)
    for array in state.values():
        array[...] = 7
    assert state_bits(population) == before


def of(count, mean=0.0, variance=1.0, channels=CHANNELS, groups=GROUPS):
    """Co-moments with these values in every channel, or by channel."""
    variances = np.broadcast_to(np.asarray(variance, np.float64), channels).reshape(groups, -1)
    scatter = np.stack([np.diag(v) for v in variances])
    return bn.CoMoments(count, np.broadcast_to(np.asarray(mean, np.float64), channels), scatter)


REFUSED_BATCHES = {
    "NaN mean": (lambda: of(4, [0, np.nan, 0, 0, 0, np.nan]), "non-finite statistics in channels 1, 5$"),
    "infinite": (lambda: of(4, 0, [1, 1, 1, np.inf, 1, 1]), "non-finite statistics in channel 3$"),
    "one position": (lambda: of(1, 0, 0), "the batch has 1 positions, wanted 2 or more"),
    "no positions": (lambda: of(0, 0, 0), "the batch has 0 positions, wanted 2 or more"),
    "channels": (lambda: of(4, channels=4), "comoments: 4 channels in 2 groups, wanted 6 in 2"),
    "groups": (lambda: of(4, groups=1), "comoments: 6 channels in 1 group, wanted 6 in 2"),
}


@pytest.mark.parametrize("case", REFUSED_BATCHES)
def test_a_refused_batch_changes_nothing(rng, make, case):
    build, message = REFUSED_BATCHES[case]
    population = make()
    population.update(batches(rng, (9,))[0])
    before = state_bits(population)
    with pytest.raises(ValueError, match=message):
        population.update(build())
    assert state_bits(population) == before


def test_floating_point_errors_of_numpy_are_not_ours(make):
    extremes = [of(4, 5e-324, 5e-324), of(1000, 1e-200, 1e-310), of(2, 1e150, 1e300), of(3, 0, 0)]
    with np.errstate(all="raise"):
        population, other = make(), make()
        for s in extremes:
            population.update(s)
            assert population.cov.shape == (GROUPS, 3, 3)
        other.load_state_dict(population.state_dict())
        with pytest.raises(ValueError, match="not finite"):
            other.load_state_dict(other.state_dict() | {"mean": np.full(CHANNELS, np.longdouble("1e400"))})
    quiet = make()
    for s in extremes:
        quiet.update(s)
    assert state_bits(population) == state_bits(other) == state_bits(quiet)


HUGE = 1.7e308


def test_a_batch_that_would_overflow_is_refused():
    population = bn.PooledCovariance()
    population.update(of(4, [0, HUGE, 0, 0, 0, 0]))
    before = state_bits(population)
    with np.errstate(all="raise"), pytest.raises(ValueError, match="too far from those before it"):
        population.update(of(4, [0, -HUGE, 0, 0, 0, 0]))
    assert state_bits(population) == before


def spoil(name, change):
    def apply(state, matrices):
        key = matrices if name == "matrices" else name
        state[key] = change(np.array(state[key], np.float64))

    return apply


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


REFUSED_STATES = {
    "missing key": (lambda s, matrices: s.pop(matrices), ValueError, "state: keys were"),
    "unknown key": (lambda s, _: s.update(other=[1.0]), ValueError, "state: keys were"),
    "mean no vector": (spoil("mean", lambda a: a[:, None]), ValueError, r"'mean'\]: shape was \(6, 1\)"),
    "mean not finite": (spoil("mean", put(1, np.inf)), ValueError, r"'mean'\]: not finite .* channel 1$"),
    "other channels": (
        spoil("mean", lambda a: a[:4]),
        ValueError,
        r"shape was \(2, 3, 3\), wanted \(groups, D, D\) with groups·D = 4",
    ),
    "no matrices": (spoil("matrices", lambda a: a[0]), ValueError, r"shape was \(3, 3\), wanted"),
    "not square": (spoil("matrices", lambda a: a[:, :, :2]), ValueError, r"shape was \(2, 3, 2\), wanted"),
    "not finite": (spoil("matrices", put((1, 0, 0), np.nan)), ValueError, "was not finite"),
    "not symmetric": (spoil("matrices", put((1, 0, 1), 99.0)), ValueError, "was not symmetric"),
    "negative": (spoil("matrices", put((1, 2, 2), -1.0)), ValueError, "negative variance in channel 5"),
    "no numbers": (lambda s, _: s.update(mean=["a"] * 6), TypeError, r"'mean'\] has dtype <U1"),
    "complex": (spoil("matrices", lambda a: a * 1j), TypeError, "has dtype complex128"),
}


@pytest.mark.parametrize("case", REFUSED_STATES)
def test_a_refused_state_changes_nothing(rng, make, case):
    change, error, message = REFUSED_STATES[case]
    population = make()
    population.update(batches(rng, (9,))[0])
    before, state = state_bits(population), population.state_dict()
    change(state, "cov" if "cov" in state else "scatter")
    with pytest.raises(error, match=message):
        population.load_state_dict(state)
    assert state_bits(population) == before


@pytest.mark.parametrize("count", [1.0, 0.0, -3.0, np.nan, np.inf, [9.0], [9.0, 9.0]])
def test_counts_that_no_batches_give_are_refused(rng, count):
    population = bn.PooledCovariance()
    population.update(batches(rng, (9,))[0])
    before, state = state_bits(population), population.state_dict()
    with pytest.raises(ValueError, match=r"state\['count'\]: was .*, wanted one finite number > 1"):
        population.load_state_dict(state | {"count": np.array(count)})
    assert state_bits(population) == before


def test_the_state_of_one_kind_is_refused_by_the_other(rng):
    one, other = (make() for make in ESTIMATORS.values())
    for population in (one, other):
        population.update(batches(rng, (9,))[0])
    for a, b in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="state: keys were"):
            a.load_state_dict(b.state_dict())


def test_repr_says_how_to_make_it(make):
    names = {"MovingCovariance": bn.MovingCovariance, "PooledCovariance": bn.PooledCovariance}
    assert repr(eval(repr(make()), names)) == repr(make())
