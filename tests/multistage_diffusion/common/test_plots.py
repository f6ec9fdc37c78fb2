import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.common.plots import save_sample_grid
from multistage_diffusion.training import loss_curves
from multistage_diffusion.training.loss_curves import plot_loss
from multistage_diffusion.training.run_log import RunLog


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def write_log(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def drawn_pixels(path, color):
    """How many pixels of a plot have exactly this colour."""
    rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return int((read(path)[..., :3] == rgb).all(-1).sum())


def test_grid_puts_every_pixel_in_its_place(tmp_path):
    images = torch.linspace(-1, 1, 5 * 3 * 4 * 4).view(5, 3, 4, 4)
    grid = read(save_sample_grid(images, tmp_path / "new" / "grid.png", columns=3, scale=2))
    assert grid.shape == (2 + 2 * (4 * 2 + 2), 2 + 3 * (4 * 2 + 2), 3)
    for number in range(5):
        top, left = 2 + number // 3 * 10, 2 + number % 3 * 10
        expected = images[number].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(grid[top : top + 8 : 2, left : left + 8 : 2], expected)
        assert np.array_equal(grid[top + 1 : top + 8 : 2, left + 1 : left + 8 : 2], expected)
    assert (grid[12:, 22:] == 128).all()  # the sixth cell stays empty


@pytest.mark.parametrize(("size", "scale"), [(16, 4), (8, 8), (64, 1), (200, 1)])
def test_grid_enlarges_small_images(tmp_path, size, scale):
    grid = read(save_sample_grid(torch.zeros(1, 1, size, size), tmp_path / "grid.png"))
    assert grid.shape == (size * scale + 4, size * scale + 4)


def test_grid_clamps_and_takes_half_precision(tmp_path):
    images = torch.tensor([-3.0, 3.0], dtype=torch.bfloat16).view(2, 1, 1, 1)
    grid = read(save_sample_grid(images, tmp_path / "grid.png", columns=2, scale=1))
    assert (grid[2, 2], grid[2, 5]) == (0, 255)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (torch.zeros(2, 2, 4, 4), {}, ValueError, r"got shape \[2, 2, 4, 4\]"),
        (torch.zeros(2, 4, 4), {}, ValueError, r"got shape \[2, 4, 4\]"),
        (torch.zeros(0, 1, 4, 4), {}, ValueError, r"got shape \[0, 1, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), {}, TypeError, "uint8"),
        (torch.full((2, 1, 4, 4), torch.nan), {}, ValueError, "2 of 2 images"),
        (torch.zeros(2, 1, 4, 4), {"columns": 0}, ValueError, "columns .* got 0"),
        (torch.zeros(2, 1, 4, 4), {"scale": -1}, ValueError, "scale .* got -1"),
    ],
)
def test_grid_refuses_what_is_no_batch_of_images(tmp_path, images, options, error, message):
    with pytest.raises(error, match=message):
        save_sample_grid(images, tmp_path / "grid.png", **options)


def test_loss_draws_a_line_for_each_stage(tmp_path):
    records = [{"step": s, "loss": 1 / s, "loss_stage": [2 / s, 3 / s]} for s in range(1, 50)]
    path = plot_loss(write_log(tmp_path / "log.jsonl", records), tmp_path / "loss.png")
    counts = [drawn_pixels(path, color) for color in ("#222222", "#0072B2", "#D55E00", "#009E73")]
    assert min(counts[:3]) > 500  # a line across the plot
    assert counts[3] == 0  # no third stage


def test_loss_tolerates_gaps_and_lines_that_are_no_records(tmp_path):
    records = [
        {"step": 0, "loss": 1.0, "loss_stage": [1.0, 1.0]},
        {"event": "resumed"},
        {"step": 10, "loss": 0.5},
        {"step": 20, "loss": None, "loss_stage": [0.4, None]},
        {"step": 30, "loss": float("nan"), "loss_stage": None},
        {"step": 40, "loss": 0.3, "loss_stage": [None, None, 0.2]},
        [60, 1.0],
        {"step": 10**400, "loss": 1.0},
        {"step": 70, "loss": "1.0", "loss_stage": 5},
        {"step": True, "loss": 1.0},
    ]
    log = write_log(tmp_path / "log.jsonl", records, tail='{"step": 50, "lo\n\xff\0\n{"step": 50, "lo')
    curves = loss_curves._loss_curves(RunLog(log).read())
    assert [(c.stage, c.steps.tolist(), c.losses.tolist()) for c in curves] == [
        (None, [10, 40], [0.5, 0.3]),
        (0, [20], [0.4]),
        (2, [40], [0.2]),
    ]
    assert plot_loss(log, tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no positive loss"),
        ('{"step": 0, "loss": 1.0}\n', "no positive loss"),
        ('{"step": 1, "lo\n[1, 2]\n', "no positive loss"),
    ],
)
def test_loss_refuses_a_log_without_losses(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")


def test_loss_names_the_missing_log(tmp_path):
    with pytest.raises(ValueError, match=r"log\.jsonl cannot be read"):
        plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")


def test_smoothing_is_the_mean_over_a_window_on_the_log_axis():
    steps = np.array([10.0, 11, 12, 20, 24, 100])
    losses = np.array([1.0, 2, 6, 4, 8, 5])
    np.testing.assert_allclose(loss_curves._smoothed(steps, losses, np.arange(6)), [3, 3, 3, 6, 6, 5])
    np.testing.assert_allclose(loss_curves._smoothed(steps, losses, np.array([2, 5])), [3, 5])


def test_smoothing_keeps_what_is_small_beside_an_early_loss():
    steps = np.arange(1.0, 1001)
    losses = np.where(steps == 1, 1e20, 0.5)
    smoothed = loss_curves._smoothed(steps, losses, np.arange(1000))
    np.testing.assert_allclose(smoothed[1:], 0.5)


def test_thinning_keeps_both_ends_and_few_points():
    shown = loss_curves._thinned(np.arange(1.0, 200_001))
    assert (shown[0], shown[-1]) == (0, 199_999)
    assert 500 < len(shown) <= 1500


def test_output_suffix_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg or \.pdf, got .*loss\.txt"):
        plot_loss(write_log(tmp_path / "log.jsonl", [{"step": 1, "loss": 1.0}]), tmp_path / "loss.txt")
    with pytest.raises(ValueError, match=r"end in \.png, got"):
        save_sample_grid(torch.zeros(1, 1, 2, 2), tmp_path / "grid.svg")


def test_import_does_not_load_matplotlib():
    code = "import sys, multistage_diffusion.common.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
