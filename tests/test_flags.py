"""The number types of training.py that every stage's flags share."""

import argparse

import pytest

import training


def refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    return str(error.value)


def test_square_brackets_take_the_end_of_an_interval_and_round_ones_do_not():
    share = training.real("(0, 1]")
    assert share("1") == 1.0 and share("1e-9") == 1e-9
    assert refused(share, "0") == "must lie in (0, 1], not 0"
    assert refused(share, "1.1") == "must lie in (0, 1], not 1.1"
    count = training.integer("[2, inf)")
    assert count("2") == 2 and count("1000000") == 10**6
    assert refused(count, "1") == "must lie in [2, inf), not 1"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("interval", ["(0, 1]", "[0, inf)", "(-inf, inf)"])
def test_a_number_of_a_flag_is_finite(interval, text):
    assert refused(training.real(interval), text) == f"must lie in {interval}, not {text}"


def test_words_are_no_numbers_and_fractions_no_whole_ones():
    assert refused(training.real("[0, 1]"), "half") == "must be a number, not half"
    assert refused(training.integer("[0, 9]"), "1.5") == "must be a whole number, not 1.5"


def test_a_wrong_flag_is_one_line_and_status_2(capsys):
    parser = training.Parser("A stage.\n\nMore about it.")
    parser.add_argument("--top-p", type=training.real("(0, 1]"), default=1.0, help="mass")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--top-p", "2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: argument --top-p: must lie in (0, 1], not 2\n"
