"""Population estimators: their formulas, their bits, their errors, and that an error changes nothing."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import batchnorm as bn

CHANNELS = 3
ESTIMATORS = {
    "moving": lambda: bn.MovingAverage(update_weight=0.3),
    "count": lambda: bn.Algorithm2(),
    "equal": lambda: bn.Algorithm2(weighting="equal"),
}


@pytest.fixture(params=ESTIMATORS)
def make(request):
    return ESTIMATORS[request.param]


def batches(rng, sizes, mean=0.0):
    return [bn.moments(rng.normal(mean, 2.0, (size, CHANNELS))) for size in sizes]


def state_bits(population):
    return {name: array.tobytes() for name, array in population.state_dict().items()}


def of_channel(k, moments):
    """Count, mean, M2 of channel k of each batch, as exact rational numbers."""
    return [tuple(Fraction(float(a[k])) for a in (m.count, m.mean, m.m2)) for m in moments]


def test_moving_average_is_the_formula_bit_for_bit(rng):
    w = 0.3
    population, mean, var = bn.MovingAverage(update_weight=w), np.zeros(CHANNELS), np.ones(CHANNELS)
    for m in batches(rng, (5, 2, 60, 7)):
        population.update(m)
        mean, var = (1 - w) * mean + w * m.mean, (1 - w) * var + w * m.var_unbiased
        assert population.mean.tobytes() == mean.tobytes()
        assert population.var.tobytes() == var.tobytes()


def test_update_weight_one_keeps_the_last_batch(rng):
    population, moments = bn.MovingAverage(update_weight=1), batches(rng, (4, 9))
    for m in moments:
        population.update(m)
    np.testing.assert_array_equal(population.mean, moments[-1].mean)
    np.testing.assert_array_equal(population.var, moments[-1].var_unbiased)


@pytest.mark.parametrize("weight", [0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_update_weight_range(weight):
    with pytest.raises(ValueError, match="update_weight: was"):
        bn.MovingAverage(update_weight=weight)


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_algorithm2_by_count(rng, mean):
    """E = Σ m_b·μ_b / Σ m_b, Var = Σ M2_b / Σ (m_b - 1), against exact arithmetic, for unequal batches."""
    moments = batches(rng, (2, 60, 7, 60, 1000, 3) * 20, mean)
    population = bn.Algorithm2()
    for m in moments:
        population.update(m)
    for k in range(CHANNELS):
        parts = of_channel(k, moments)
        e = sum(n * mu for n, mu, _ in parts) / sum(n for n, _, _ in parts)
        v = sum(m2 for _, _, m2 in parts) / sum(n - 1 for n, _, _ in parts)
        assert abs(population.mean[k] - e) < 1e-15 * (abs(e) + 2)
        assert abs(population.var[k] - v) < 1e-14 * v


def test_algorithm2_by_batch(rng):
    """As the paper writes it: E = mean of μ_b, Var = mean of m_b/(m_b - 1)·σ_b²."""
    moments = batches(rng, (2, 60, 7, 1000, 3))
    population = bn.Algorithm2(weighting="equal")
    for m in moments:
        population.update(m)
    for k in range(CHANNELS):
        parts = of_channel(k, moments)
        e = sum(mu for _, mu, _ in parts) / len(parts)
        v = sum(n / (n - 1) * (m2 / n) for n, _, m2 in parts) / len(parts)
        assert abs(population.mean[k] - e) < 1e-15 * (abs(e) + 1)
        assert abs(population.var[k] - v) < 1e-14 * v


def test_weightings_agree_for_equal_batches_only(rng):
    for sizes, agree in (((60, 60, 60, 60), True), ((60, 60, 60, 5), False)):
        moments = batches(rng, sizes)
        count, equal = bn.Algorithm2(), bn.Algorithm2(weighting="equal")
        for m in moments:
            count.update(m)
            equal.update(m)
        assert np.allclose(count.mean, equal.mean, rtol=1e-14, atol=1e-15) == agree
        assert np.allclose(count.var, equal.var, rtol=1e-14) == agree


def test_algorithm2_refuses_another_weighting():
    with pytest.raises(ValueError, match="weighting: was 'batch'"):
        bn.Algorithm2(weighting="batch")


def test_not_ready_until_the_first_batch_and_after_reset(rng, make):
    population = make()
    for _ in range(2):
        assert not population.ready
        assert population.state_dict() == {}
        for name in ("mean", "var"):
            with pytest.raises(ValueError, match="has seen no batch"):
                getattr(population, name)
        population.update(batches(rng, (9,))[0])
        assert population.ready
        assert population.mean.shape == population.var.shape == (CHANNELS,)
        assert population.mean.dtype == population.var.dtype == np.float64
        population.reset()


def test_state_travels_with_every_bit(rng, make):
    one, other, moments = make(), make(), batches(rng, (5, 60, 2, 9))
    other.update(bn.moments(rng.normal(size=(4, CHANNELS + 1))))  # what a load replaces, channels and all
    for m in moments[:2]:
        one.update(m)
    other.load_state_dict(one.state_dict())
    assert state_bits(other) == state_bits(one)
    for m in moments[2:]:
        one.update(m)
        other.update(m)
    assert state_bits(other) == state_bits(one)
    one.load_state_dict({})
    assert not one.ready


def test_nothing_that_is_handed_out_or_taken_in_is_shared(rng, make):
    population = make()
    population.update(batches(rng, (9,))[0])
    before, state = state_bits(population), population.state_dict()
    population.mean[:] = 7
    population.var[:] = 7
    for array in population.state_dict().values():
        array[:] = 7
    assert state_bits(population) == before
    population.load_state_dict(state)
    for array in state.values():
        array[:] = 7
    assert state_bits(population) == before


def constant(count, mean, m2):
    return bn.Moments(*(np.asarray(a, np.float64) for a in (count, mean, m2)))


REFUSED_BATCHES = {
    "NaN mean": (constant([4] * 3, [0, np.nan, np.nan], [1] * 3), "non-finite statistics in channels 1, 2$"),
    "infinite M2": (constant([4] * 3, [0] * 3, [np.inf, 1, 1]), "non-finite statistics in channel 0$"),
    "one value": (constant([4, 4, 1], [0] * 3, [1, 1, 0]), "fewer than 2 values in channel 2$"),
    "no values": (constant([0] * 3, [0] * 3, [0] * 3), "fewer than 2 values in channels 0, 1, 2$"),
    "4 channels": (constant([4] * 4, [0] * 4, [1] * 4), "moments: 4 channels, wanted 3"),
}


@pytest.mark.parametrize("case", REFUSED_BATCHES)
def test_a_refused_batch_changes_nothing(rng, make, case):
    moments, message = REFUSED_BATCHES[case]
    population = make()
    population.update(batches(rng, (9,))[0])
    before = state_bits(population)
    with pytest.raises(ValueError, match=message):
        population.update(moments)
    assert state_bits(population) == before


def test_many_bad_channels_are_counted_not_listed(make):
    m = constant([4] * 20, [np.nan] * 20, [1] * 20)
    with pytest.raises(ValueError, match=r"channels 0, 1, 2, 3, 4, 5, 6, 7 and 12 more$"):
        make().update(m)


REFUSED_STATES = {
    "missing key": (lambda s: s.pop("var"), ValueError, "state: keys were"),
    "unknown key": (lambda s: s.update(other=s["mean"]), ValueError, "state: keys were"),
    "shapes differ": (lambda s: s.update(var=np.ones(4)), ValueError, "state: shapes were"),
    "no vector": (lambda s: s.update(var=np.ones((3, 1))), ValueError, r"'var'\]: shape was \(3, 1\)"),
    "not finite": (
        lambda s: s.update(mean=[0, np.inf, 0]),
        ValueError,
        r"'mean'\]: not finite .* channel 1$",
    ),
    "negative": (lambda s: s.update(var=[1, 1, -1]), ValueError, r"'var'\]: negative in channel 2"),
    "no numbers": (
        lambda s: s.update(mean=["a"] * 3),
        TypeError,
        r"'mean'\] has dtype <U1; wanted real numbers",
    ),
    "complex": (lambda s: s.update(mean=[1j] * 3), TypeError, r"'mean'\] has dtype complex128"),
}


@pytest.mark.parametrize("case", REFUSED_STATES)
def test_a_refused_state_changes_nothing(rng, make, case):
    spoil, error, message = REFUSED_STATES[case]
    population = make()
    population.update(batches(rng, (9,))[0])
    before, state = state_bits(population), population.state_dict()
    spoil(state)
    with pytest.raises(error, match=message):
        population.load_state_dict(state)
    assert state_bits(population) == before


def test_the_state_of_one_kind_is_refused_by_the_others(rng):
    populations = [make() for make in ESTIMATORS.values()]
    for population in populations:
        population.update(batches(rng, (9,))[0])
    for one in populations:
        for other in populations:
            if one is not other:
                with pytest.raises(ValueError, match="state: keys were"):
                    one.load_state_dict(other.state_dict())


IMPOSSIBLE_COUNTS = {  # what is put into the state of two batches of nine values, and what is said of it
    "fewer values than batches": (
        {"values": [18, 1, 18]},
        r"'values'\]: not more than .* in channel 1, wanted",
    ),
    "one value a batch": ({"values": [18, 18, 2]}, r"'values'\]: not more than .* in channel 2, wanted more"),
    "no values": ({"values": [0, 0, 0]}, r"'values'\]: not more than .* in channels 0, 1, 2,"),
    "negative values": ({"values": [-5, 18, 18]}, r"'values'\]: not more than .* in channel 0,"),
    "no batches": ({"batches": [0, 0, 0]}, r"'batches'\]: was \[0.0, 0.0, 0.0\], wanted one whole number"),
    "negative batches": ({"batches": [-1, -1, -1]}, r"'batches'\]: was \[-1.0, .* 1 or more"),
    "part of a batch": ({"batches": [1.5, 1.5, 1.5]}, r"'batches'\]: was \[1.5, .* one whole number"),
    "batches of one channel": ({"batches": [2, 3, 2]}, r"'batches'\]: was .* for all channels"),
}


@pytest.mark.parametrize("weighting", ["count", "equal"])
@pytest.mark.parametrize("case", IMPOSSIBLE_COUNTS)
def test_counts_that_no_batches_give_are_refused(rng, weighting, case):
    changes, message = IMPOSSIBLE_COUNTS[case]
    population = bn.Algorithm2(weighting)
    for m in batches(rng, (9, 9)):
        population.update(m)
    before, state = state_bits(population), population.state_dict()
    if not changes.keys() <= state.keys():
        assert weighting == "equal"
        return
    state.update({name: np.asarray(values, np.float64) for name, values in changes.items()})
    with pytest.raises(ValueError, match=message):
        population.load_state_dict(state)
    assert state_bits(population) == before


def test_every_state_that_batches_give_is_taken(rng, make):
    """Those of the smallest batches too, and of channels with other counts."""
    population = make()
    for counts in ([2, 3, 1000], [1.25, 2, 2], [2, 2, 2]):
        population.update(bn.Moments(counts, rng.normal(size=3), rng.uniform(size=3)))
        again = make()
        again.load_state_dict(population.state_dict())
        assert state_bits(again) == state_bits(population)


TINY, HUGE = 5e-324, 1.7e308


def test_floating_point_errors_of_numpy_are_not_ours(rng, make):
    extremes = [
        constant([4] * 3, [TINY, 1e-200, HUGE / 2], [TINY, 1e-200, HUGE / 8]),
        constant([2] * 3, [-TINY, 1e-250, HUGE / 3], [3e-324, 1e-310, HUGE / 8]),
        constant([1000] * 3, [0, 0, 0], [0, 0, 0]),
    ]
    with np.errstate(all="raise"):
        population, other = make(), make()
        for m in extremes:
            population.update(m)
        other.load_state_dict(population.state_dict())
    quiet = make()
    for m in extremes:
        quiet.update(m)
    assert state_bits(population) == state_bits(other) == state_bits(quiet)


@pytest.mark.parametrize("weighting", ["count", "equal"])
def test_a_batch_that_would_overflow_is_refused(weighting):
    population = bn.Algorithm2(weighting)
    population.update(constant([4] * 3, [0, HUGE, 0], [1] * 3))
    before = state_bits(population)
    for state in ("raise", "warn"):
        with (
            np.errstate(all=state),
            pytest.raises(ValueError, match=r"too far from those before it for float64 in channel 1$"),
        ):
            population.update(constant([4] * 3, [0, -HUGE, 0], [1] * 3))
        assert state_bits(population) == before


def test_one_channel_is_singular():
    population = bn.MovingAverage(0.5)
    population.update(constant([4] * 3, [0] * 3, [1] * 3))
    with pytest.raises(ValueError, match="moments: 1 channel, wanted 3"):
        population.update(constant([4], [0], [1]))


@pytest.mark.parametrize("weight", ["0.1", None, True, b"0.1", 1j])
def test_update_weights_that_are_no_numbers(weight):
    with pytest.raises(TypeError, match=r"^update_weight: was .*, wanted a number"):
        bn.MovingAverage(weight)
