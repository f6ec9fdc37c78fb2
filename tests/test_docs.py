"""What the documents say is true: their code runs, their commands and their files exist."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from multistage_diffusion import EDMPreconditioner, Stages, networks
from multistage_diffusion.cli import build_parser
from multistage_diffusion.commands import load_commands
from multistage_diffusion.official.convert import save_network

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.fixture
def _converted_file(tmp_path, monkeypatch):
    """What the documents' ``msd convert`` writes: the working folder has a small one."""
    network = {"family": "edm", "image_size": 8, "encoder_widths": [8], "decoder_widths": [8, 8, 4]}
    network = networks.build(network | {"channel_mult": [1], "num_blocks": 1})
    save_network(tmp_path / "model.safetensors", EDMPreconditioner(network, Stages.edm()))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_converted_file")
@pytest.mark.parametrize("index", range(len(blocks("README.md", "python"))))
def test_readme_code_runs(index, capsys):
    code = blocks("README.md", "python")[index]
    exec(compile(code, f"README.md, code {index}", "exec"), {"__name__": "__main__"})
    # A comment behind a print is its output.
    for expected in re.findall(r"^print\(.*\)  # (\[.*\])$", code, re.MULTILINE):
        assert expected in capsys.readouterr().out


@pytest.mark.usefixtures("_converted_file")
def test_the_help_of_convert_shows_how_to_read_what_it_writes(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["convert", "--help"])
    shown = capsys.readouterr().out.partition("read it in Python:\n")[2]
    found: dict = {}
    exec(textwrap.dedent(shown), found)
    assert found["network"].num_stages == 3


def commands() -> list[str]:
    """Every call of msd in the README and in the examples of ``msd COMMAND --help``."""
    shown = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    shown += [line for module in load_commands() for line in module.EXAMPLES.splitlines()]
    found = (re.match(r"\s*(?:\.venv/bin/)?((?:msd|torchrun) .+)", line) for line in shown)
    return [match[1] for match in found if match]


@pytest.mark.parametrize("command", commands())
def test_commands_have_these_options(command):
    words = shlex.split(re.split(r"\s{3,}", command.split(" #")[0])[0])  # without the comment behind it
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        assert launched.module
        assert launched.training_script == "multistage_diffusion"
        words[1:] = launched.training_script_args
    build_parser().parse_args(words[1:])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|\n)make ([a-z-]+)", text)) <= targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_local_links_exist(document):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_documents_exist(document):
    named = re.findall(
        r"`((?:msd_kernels|python|csrc|tests|benchmarks|scripts)/[\w./-]+\.\w+)`",
        (ROOT / document).read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
