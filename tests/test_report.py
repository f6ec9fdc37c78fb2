"""Every figure of the README, and of its plot, is one of the committed results."""

from __future__ import annotations

import json
import re

import pytest

from helpers import import_benchmarks

import_benchmarks()

import report  # noqa: E402
from report import Results  # noqa: E402

MACHINE = {
    "cpu": "Some CPU",
    "kind": "avx2",
    "cores": 2,
    "simd": "AVX2",
    "torch": "2.13.0",
    "commit": "0123abc",
    "date": "2026-11-30 10:00 UTC",
}


def run(**ratios: float) -> dict:
    """What pytest-benchmark writes of whole steps."""
    found = {
        "plain": [ratios["plain"], 1.0, 2.0],
        "floor": [ratios["floor"], 0.5, 0.6],
    }
    step = {"ratio": found, "peak_bytes": {"ours": 2**30, "plain": 2**31}}
    benchmarks = [
        {
            "name": f"test_{name}",
            "fullname": f"benchmarks/bench_{stem}.py::test_{name}",
            "extra_info": step,
        }
        for stem, name in report.WHOLE_STEPS.values()
    ]
    return {"machine_info": MACHINE, "benchmarks": benchmarks}


@pytest.fixture
def results(tmp_path, monkeypatch) -> Results:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "cpu-4cores-avx512-training_step.json").write_text("replaced")
    (tmp_path / "cpu-2cores-avx512-group_norm.json").write_text(
        json.dumps({"machine": MACHINE, "results": []})
    )
    report.write_files(run(plain=2.34, floor=0.71), tmp_path)
    return Results(tmp_path)


def test_the_readme_says_what_the_files_say():
    readme = report.README.read_text()
    assert report.written(readme, Results()) == readme, "python benchmarks/report.py writes it"
    assert {name for _, name, _ in report.BLOCK.findall(readme)} == set(report.BLOCKS)


def test_the_plot_shows_what_the_files_say():
    assert report.drawn() == report.bars(Results())


def test_no_figure_of_speed_is_outside_of_the_written_blocks():
    readme = report.README.read_text()
    section = readme.partition("## How fast it is\n")[2].partition("\n## ")[0]
    assert re.findall(r"\d+\.\d+|\d+ (?:times|%)", report.BLOCK.sub("", section)) == []


def test_a_run_becomes_files_in_the_place_of_older_ones(results, tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cpu-2cores-avx2-sampling_step.json",
        "cpu-2cores-avx2-training_step.json",
        "cpu-2cores-avx512-group_norm.json",
    ]
    assert results.machines["training_step"] == MACHINE
    assert results.ratio("training_step", "training_step_float32[8-0-0]", "plain") == 2.34


def test_tables_come_from_the_files(results):
    text = "<!-- figures: whole steps -->\nold 9.99\n<!-- end -->\nkept\n<!-- figures: machines -->\n<!-- end -->\n"
    found = report.written(text, results)
    assert "| training, 8 samples of the widest stage | 2.34 | 0.71 | 1024 MiB | 2048 MiB |" in found
    assert "9.99" not in found
    assert "\nkept\n" in found
    assert "2 cores, Some CPU (AVX2), PyTorch 2.13.0, commit 0123abc, 2026-11-30" in found
    assert report.written(found, results) == found
    with pytest.raises(KeyError, match="nobody"):
        report.written(text.replace("machines", "nobody"), results)


def test_models_of_other_people_have_a_row_per_pass_and_a_column_per_order(results, tmp_path):
    races = [
        {
            "model": "U-Net",
            "dtype": "float32",
            "order": order,
            "pass": "forward",
            "ratio": {"original": [ratio]},
        }
        for order, ratio in (("NHWC", 1.5), ("NCHW", 1.25))
    ]
    report.write_files({**MACHINE, "models": races}, tmp_path)
    found = report.whole_models(Results(tmp_path))
    assert "| original / replaced | NCHW | NHWC |" in found
    assert "| U-Net, float32, forward | 1.25 | 1.50 |" in found


def test_what_was_not_measured_has_no_figure(results):
    assert "| forward, bf16 [8, 256, 32, 32] | – | – | – |" in report.group_norm(results)
    assert not re.search(r"\d", report.optimal_denoiser(results))


def test_the_plot_keeps_what_it_shows(results, tmp_path):
    report.draw(results, tmp_path / "speed.png")
    assert report.drawn(tmp_path / "speed.png") == {f"fp32 {label}": 2.34 for label in report.WHOLE_STEPS}
