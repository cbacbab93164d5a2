"""What a budget may be written as."""

import pytest

from tbptt_ckpt import ArgumentError
from tbptt_ckpt.budget.amount import parse_budget


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("0.5", 0.5), (".25", 0.25), ("1.0", 1.0), ("50%", 0.5), (" 100 % ", 1.0), ("12.5%", 0.125)],
)
def test_a_fraction_may_be_text(text, fraction):
    assert parse_budget(text).fraction == parse_budget(fraction).fraction == fraction


@pytest.mark.parametrize("text", ["0.0", "0%", "101%", "0.0%", 1.5, 0.0, float("nan")])
def test_a_part_above_all_or_of_nothing_is_refused(text):
    with pytest.raises(ArgumentError, match=r"^--budget=.* must be above 0 and at most 1"):
        parse_budget(text, "--budget")


@pytest.mark.parametrize(("text", "num_bytes"), [("1", 1), ("8G", 2**33), ("8e9", 8 * 10**9)])
def test_a_size_is_read_as_everywhere(text, num_bytes):
    assert parse_budget(text).num_bytes == num_bytes
