"""The mean over seeds and its spread."""

from examples.common import over_seeds


def test_a_spread_has_the_decimals_of_its_deviation_and_counts_divergences():
    assert over_seeds.text([0.00135, 0.00151]) == "0.00143 ± 0.00011"
    assert over_seeds.text([2.0, 2.0]) == "2 ± 0"
    assert over_seeds.text([2e-6, 4e-6]) == "3e-06 ± 1.4e-06"
    assert over_seeds.text([0.5, None, 0.6]) == "1 of 3 diverged"
    assert over_seeds.text([0.123456]) == "0.1235"


def test_the_deviation_is_that_of_a_sample():
    assert over_seeds.deviation([1.0, 2.0, 3.0]) == 1.0
    assert over_seeds.deviation([1.0]) == 0.0
