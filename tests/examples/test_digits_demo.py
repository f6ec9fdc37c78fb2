"""The demo of the digits, with a few steps of a tiny network and one quick judge: the real one takes minutes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest
import torch

import demo
from multistage_diffusion.presets import DIGITS, TRAINABLE
from multistage_diffusion.training.trainer import TrainingResult

JUDGED = (
    "confident_share",
    "confident_held_out",
    "confident_noise",
    "frechet_samples",
    "frechet_held_out",
    "frechet_noise",
)


class ZeroForEverything:
    def probabilities(self, images):
        return torch.eye(10)[:1].expand(len(images), -1)

    def features(self, images):
        return images.flatten(1)[:, ::64]


@pytest.fixture
def quick(monkeypatch):
    network = {
        "encoder_widths": (8,),
        "decoder_widths": (8, 8, 4),
        "channel_mult": (1,),
        "attn_resolutions": (),
    }
    tiny = dataclasses.replace(DIGITS, network={**DIGITS.network, **network})
    monkeypatch.setitem(TRAINABLE, "digits", tiny)
    monkeypatch.setattr(demo, "evaluate_digits", lambda images: dict.fromkeys(JUDGED, 0.5))
    monkeypatch.setattr(demo, "digit_classifier", ZeroForEverything)


def test_demo(quick, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "demo"), "--steps", "3", "--device", "cpu"]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "a classifier is sure of 50.0%" in printed
    assert "against 899 held-out digits" in printed.splitlines()[-6]
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == [
        "frechet",
        "precision",
        "recall",
        "kid",
    ]
    written = {p.name for p in (tmp_path / "demo").iterdir()}
    assert {"samples.png", "loss.png", "metrics.json", "checkpoints", "stages"} <= written
    assert {p.name for p in (tmp_path / "demo" / "stages").iterdir()} == {
        "stages.json",
        "similarity.png",
        "curves.png",
    }
    result = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert result["steps"] == 3
    assert sum(result["evaluations_per_stage"]) == 35
    assert result["seconds"] > 0
    assert result["asked_digit_share"] == 26 / 256  # seeds 0, 10, ..., 250
    (tmp_path / "demo" / "samples.png").unlink()
    assert demo.main(arguments) == 0  # measures again
    assert (tmp_path / "demo" / "samples.png").exists()


def test_a_demo_that_was_stopped_says_so_and_goes_on(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_, **__: TrainingResult(1, tmp_path, 15, 1.0))
    monkeypatch.setattr(demo, "measure", lambda *_: pytest.fail("measured"))
    assert demo.main(["--out", str(tmp_path), "--stages", "0.5,2"]) == 128 + 15


def test_metrics_are_written_as_a_whole(quick, tmp_path, monkeypatch):
    """Where the disk is full, those of the run before stay."""

    def cut_short(path, text):
        path.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "metrics.json").write_text("before")
    monkeypatch.setattr(demo, "train", lambda *_, **__: TrainingResult(1, tmp_path, None, 1.0))
    monkeypatch.setattr(demo, "measure", lambda *_: {"train_seconds": 1.0})
    monkeypatch.setattr(type(tmp_path), "write_text", cut_short)
    with pytest.raises(OSError, match="No space left"):
        demo.main(["--out", str(tmp_path), "--stages", "0.5,2"])
    assert (tmp_path / "metrics.json").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json"}
