"""Three stages of handwritten digits on a CPU: finds the stages, trains a model, samples from it, measures the samples.

A demo that was stopped goes on where it was; a finished one is sampled and measured again.

    python examples/digits/demo.py --out runs/demo
    python examples/digits/demo.py --out runs/demo --steps 300      # quicker, with worse digits
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from digit_classifier import all_images, digit_classifier, digit_halves
from digit_metrics import evaluate_digits
from multistage_diffusion import (
    Evaluation,
    Stages,
    configure,
    evaluate,
    find_stages,
    generate,
    load_images,
    load_model,
    train,
)
from multistage_diffusion.clustering.pictures import plot_curves, plot_matrix
from multistage_diffusion.common.atomic_files import replacing
from multistage_diffusion.common.host_memory import keep_freed_memory
from multistage_diffusion.common.plots import save_sample_grid
from multistage_diffusion.data.images import ImageData
from multistage_diffusion.sampling.samplers import class_labels
from multistage_diffusion.training.configure import saved_settings
from multistage_diffusion.training.run_log import RunLog

NUM_SAMPLES = 256
SHOWN = 100  # ten of each digit, a column for each


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns 0, or 128 + the number of the signal that stopped its training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for samples.png, loss.png, metrics.json, the checkpoints and, in stages/, the pictures of "
        "the clustering; default: runs/demo",
    )
    parser.add_argument("--steps", type=int, help="training steps; default: those of the preset")
    parser.add_argument("--seed", type=int, default=0, help="of everything random; default: 0")
    parser.add_argument("--stages", help="three of them, as of msd train; default: found in the digits")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: a GPU if there is one")
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    keep_freed_memory()
    data = load_images("digits")
    saved = saved_settings(args.out)
    stages = args.stages
    if stages is None and saved is None:
        stages = found_stages(data, args.out / "stages")
    steps = {} if args.steps is None else {"steps": args.steps}
    config = configure(
        data, "digits", saved=saved, class_conditional=True, stages=stages, seed=args.seed, **steps
    )
    result = train(config, data, args.out, resume=saved is not None, device=args.device)
    if result.stopped_by is not None:
        print(f"stopped after step {result.step}; start it again to go on", file=sys.stderr)
        return 128 + result.stopped_by
    start = time.monotonic()
    metrics = measure(args.out, args.device)
    seconds = time.monotonic() - start
    metrics |= {"measure_seconds": round(seconds, 1), "seconds": round(metrics["train_seconds"] + seconds, 1)}
    with replacing(args.out / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    print(summary(args.out, metrics))
    return 0


def found_stages(data: ImageData, directory: Path) -> Stages:
    """The stages of the digits, with pictures of how they were found."""
    found = find_stages(data, "edm", measure="smooth", samples=100)
    found.stages.save(directory / "stages.json")
    plot_matrix(found.similarity, found.split, directory / "similarity.png", found.schedule, title="digits")
    plot_curves(found.similarity, found.split, directory / "curves.png", level=found.rule.level)
    for stage, (low, high) in enumerate(found.confidence):
        print(
            f"stage {stage} ends at {found.split.cuts[stage]:.4g} ({low:.4g} to {high:.4g})", file=sys.stderr
        )
    return found.stages


def measure(directory: Path, device) -> dict:
    """Samples from the trained model, writes samples.png, and judges the samples."""
    model = load_model(directory, device=device)
    network = model.denoiser.network
    shape = (network.in_channels, network.image_size, network.image_size)
    print(f"sampling {NUM_SAMPLES} images", file=sys.stderr)
    seeds = range(NUM_SAMPLES)
    labels = class_labels(network, seeds)
    samples = generate(model.denoiser, seeds, shape, batch_size=128, dtype=torch.float32, **labels)
    images = samples.images.float()
    save_sample_grid(images[:SHOWN], directory / "samples.png", columns=network.label_dim)
    classifier = digit_classifier()
    judged = classifier.probabilities(images).argmax(dim=1)
    held_out = all_images(digit_halves()[1])
    quality = evaluate(images, held_out, classifier.features, batch_size=NUM_SAMPLES)
    asked = labels["class_labels"].argmax(dim=1)
    log, seconds = RunLog(directory / "log.jsonl"), model.metadata["seconds"]
    records = [] if log.is_empty() else log.read()
    return {
        **evaluate_digits(images),
        "quality": quality.report(),
        "asked_digit_share": float((judged == asked).float().mean()),
        "steps": model.step,
        "train_seconds": round(seconds, 3),
        "images_per_second": round(model.images / max(seconds, 1e-9), 1),
        "loss_stage": records[-1].get("loss_stage") if records else None,
        "evaluations_per_sample": samples.evaluations,
        "evaluations_per_stage": samples.evaluations_per_stage,
    }


def summary(directory: Path, metrics: dict) -> str:
    """What the demo did, in a few lines."""
    quality = Evaluation.of_report(metrics["quality"])
    return (
        f"{directory}: {metrics['steps']} steps at {metrics['images_per_second']:.0f} images/s, "
        f"{metrics['seconds']:.0f} s in all\n"
        f"  a classifier is sure of {metrics['confident_share']:.1%} of the samples "
        f"(real digits {metrics['confident_held_out']:.1%}, noise {metrics['confident_noise']:.1%})\n"
        f"  and takes {metrics['asked_digit_share']:.1%} for the digit that was asked for\n"
        f"  Fréchet distance {metrics['frechet_samples']:.2f} "
        f"(real digits {metrics['frechet_held_out']:.2f}, noise {metrics['frechet_noise']:.2f})\n"
        f"  see samples.png, loss.png, metrics.json\n"
        f"by that classifier's features, against {quality.reference_images} held-out digits:\n{quality}"
    )


if __name__ == "__main__":
    sys.exit(main())
