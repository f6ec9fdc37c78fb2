"""The types of the commands' arguments."""

import argparse
import math

import pytest

from multistage_diffusion.common.settings import Several, number, seed, whole


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999"])
def test_numbers_are_finite(text):
    for parse in (number(), Several()):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} must be finite"):
            parse(text)
    for parse in (number(low=0), number(above=0)):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} must be"):
            parse(text)


def test_infinity_where_it_has_a_meaning():
    parse = number(low=0, infinite=True)
    assert parse("inf") == math.inf
    for text, message in (("nan", "at least 0"), ("-inf", "at least 0"), ("-1", "at least 0")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError, match="nan must be finite"):
        number(infinite=True)("nan")


def test_several_numbers():
    assert Several()("0.5,2,-1e3") == (0.5, 2.0, -1000.0)
    with pytest.raises(argparse.ArgumentTypeError, match="'x' is not a number"):
        Several()("1,x")


def test_whole_numbers_and_seeds_have_ends():
    assert whole(1, 3)("3") == 3
    assert (seed("0"), seed(str(2**64 - 1))) == (0, 2**64 - 1)
    for parse, text, message in (
        (whole(1, 3), "4", "4 must be at most 3"),
        (whole(1, 3), "0", "0 must be at least 1"),
        (seed, "-1", "-1 must be at least 0"),
        (seed, str(2**64), f"{2**64} must be at most {2**64 - 1}"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse(text)
