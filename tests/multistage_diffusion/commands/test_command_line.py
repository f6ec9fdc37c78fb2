"""The command line around its commands: lists that begin with a minus, the version, exit codes, whole files."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import pytest

from multistage_diffusion import cli
from multistage_diffusion.commands import flops

EDM = ["flops", "--preset", "edm-cifar10"]


@pytest.mark.parametrize("words", [["--sigma-units", "-1,1"], ["--sigma-units=-1,1"]])
def test_a_list_may_begin_with_a_minus(words):
    args = cli.build_parser().parse_args(["cluster", "--data", "digits", "--out", "x", *words, "--debug"])
    assert args.sigma_units == "-1,1"
    assert args.debug


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--a", "-1,1", "--b"], ["--a=-1,1", "--b"]),
        (["--a", "-.5"], ["--a=-.5"]),
        (["--a", "-inf", "-1"], ["--a=-inf", "-1"]),
        (["--a=2", "-1"], ["--a=2", "-1"]),
        (["--a", "-o", "x"], ["--a", "-o", "x"]),
        (["--a", "--1"], ["--a", "--1"]),
        (["--", "-1"], ["--", "-1"]),
        (["-1"], ["-1"]),
    ],
)
def test_only_numbers_join_the_option_before_them(words, joined):
    assert cli._joined(words) == joined


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("-1,1,1", "--shares -1,1,1: one share per stage (3) is needed, none negative, with the sum 1"),
        ("0.5,0.5", "--shares 0.5,0.5: one share per stage (3) is needed"),
        ("0.5,0.5,0.5", "with the sum 1"),
    ],
)
def test_shares_that_are_none_are_named(shares, message, capsys):
    assert cli.main([*EDM, "--shares", shares]) == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"msd {metadata.version('msd-kernels')}\n"


def test_version_of_what_is_not_installed(capsys, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "msd (not installed)\n"


def test_a_package_that_is_missing_is_named_in_one_line():
    """NumPy: also what tells errors apart needs it."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from multistage_diffusion.cli import main\n"
        "sys.exit(main(['train', '--data', 'digits', '--out', 'x', '--device', 'cpu']))"
    )
    path = repr(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path = {path}\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r"(warning.*\n)*msd train: ModuleNotFoundError: .*numpy.*\n", done.stderr), (
        done.stderr
    )


def test_shares_of_the_presets_pass_the_check():
    args = cli.build_parser().parse_args([*EDM, "--shares", "0.4,0.3,0.3"])
    assert flops.report(args)["training"]["shares"] == [0.4, 0.3, 0.3]
