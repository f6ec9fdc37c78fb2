"""Every metric against an independent computation, and on cases whose answers are known."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from multistage_diffusion import evaluate
from multistage_diffusion.data.images import ImageData
from multistage_diffusion.evaluation import (
    Statistics,
    frechet_distance,
    kernel_distance,
    load_features,
    nearest,
    precision,
    radii,
    recall,
)

linalg = pytest.importorskip("scipy.linalg")
neighbors = pytest.importorskip("sklearn.neighbors")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def flat(batch):
    return batch.flatten(1).double()


def normal(generator, count, size, mean=0.0, scale=1.0):
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * scale + mean


def images(features):
    """Images whose :func:`flat` features these are."""
    return features[:, :, None, None]


@pytest.mark.parametrize("size", [1, 5, 12])
def test_frechet_distance_agrees_with_sqrtm(size, generator):
    mixing = normal(generator, size, size)
    a, b = normal(generator, 200, size) @ mixing, normal(generator, 150, size, mean=0.3, scale=1.7)
    cov_a, cov_b = np.atleast_2d(np.cov(a.numpy().T)), np.atleast_2d(np.cov(b.numpy().T))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(Statistics.of(a), Statistics.of(b)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_singular_covariances(generator):
    """Of covariances that commute it is the sum of squared differences of standard deviations."""
    basis = torch.linalg.qr(normal(generator, 6, 6)).Q
    deviations = torch.tensor([[3.0, 2, 1, 0, 0, 0], [1.0, 0, 4, 2, 0, 0]], dtype=torch.float64)
    a, b = (Statistics(torch.zeros(6), basis * d**2 @ basis.T, None) for d in deviations)
    expected = float((deviations[0] - deviations[1]).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("features", [np.eye(4, 3) * 1e160, np.full((4, 3), 1e160)])
def test_features_whose_squares_overflow_are_refused(features):
    with pytest.raises(ValueError, match="too large, their squares overflow float64"):
        Statistics.of(torch.from_numpy(features))


def test_the_same_images_are_at_no_distance(generator):
    a = images(normal(generator, 60, 4))
    found = evaluate(a, a, flat)
    assert found["frechet"] == pytest.approx(0, abs=1e-9)
    assert found["precision"] == found["recall"] == 1
    assert list(found) == ["frechet", "precision", "recall", "kid"]
    assert all(type(value) is float for value in found.values())


def test_shifted_gaussians_are_at_the_distance_of_the_formula(generator):
    shift = torch.tensor([1.0, -2, 0.5], dtype=torch.float64)
    a = normal(generator, 500, 3)
    assert evaluate(images(a), images(a + shift), flat, resamples=0)["frechet"] == pytest.approx(
        float(shift.square().sum()), rel=1e-9
    )


def test_a_subset_is_precise_and_covers_little(generator):
    real = torch.cat([normal(generator, 40, 2), normal(generator, 160, 2, mean=50)])
    found = evaluate(images(real[:40]), images(real), flat)
    assert found["precision"] == 1
    assert found["recall"] == pytest.approx(0.2)


def test_points_at_one_place_are_within_a_radius_of_nothing(generator):
    """Distances are differences of products: rounding must not put a point beside itself."""
    real = normal(generator, 3, 2, mean=1e3).repeat_interleave(5, 0)
    found = evaluate(images(real), images(real), flat)
    assert found["precision"] == found["recall"] == 1


@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_agree_with_scikit_learn(k, generator, monkeypatch):
    monkeypatch.setattr("multistage_diffusion.evaluation.neighbours.BLOCK", 1000)  # several blocks
    a, b = normal(generator, 90, 7), normal(generator, 70, 7, mean=0.4)
    tree_a, tree_b = (neighbors.NearestNeighbors(n_neighbors=k + 1).fit(t.numpy()) for t in (a, b))
    expected = tree_b.kneighbors(b.numpy())[0][:, -1]
    torch.testing.assert_close(radii(b, k), torch.from_numpy(expected).square(), rtol=1e-6, atol=0)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    assert precision(a, b, radii(b, k)).tolist() == (distances <= expected).any(1).tolist()
    of_a = tree_a.kneighbors(a.numpy())[0][:, -1]
    assert recall(a, b, k).tolist() == (distances <= of_a[:, None]).any(0).tolist()
    closest = nearest(a, b)
    assert closest.index.tolist() == distances.argmin(1).tolist()
    torch.testing.assert_close(
        closest.distance, torch.from_numpy(distances.min(1)).square(), rtol=1e-6, atol=0
    )


def test_kernel_distance_is_the_mean_over_pairs(generator, monkeypatch):
    monkeypatch.setattr("multistage_diffusion.evaluation.distances.BLOCK", 100)
    a, b = normal(generator, 30, 5), normal(generator, 20, 5, mean=0.5)

    def kernel(x, y):
        return float(x @ y / 5 + 1) ** 3

    pairs_a = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    pairs_b = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    across = [kernel(x, y) for x in a for y in b]
    expected = np.mean(pairs_a) + np.mean(pairs_b) - 2 * np.mean(across)
    assert kernel_distance(a, b).value == pytest.approx(expected, rel=1e-9)


def test_the_error_of_kid_is_that_of_other_draws(generator):
    draws = [
        kernel_distance(normal(generator, 80, 4), normal(generator, 100, 4, mean=0.6)) for _ in range(200)
    ]
    spread = np.std([found.value for found in draws])
    assert np.mean([found.error for found in draws]) == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize("name", ["frechet", "recall"])
def test_errors_are_those_of_other_draws(name, generator):
    """Of samples alone: the real images stay. 60 draws tell a spread to 9 %, halves another 16 %."""
    real = images(normal(generator, 200, 3))
    draws = [
        evaluate(images(normal(generator, 100, 3, mean=0.4)), real, flat).figures[name] for _ in range(60)
    ]
    spread = np.std([figure.value for figure in draws])
    assert np.mean([figure.error for figure in draws]) == pytest.approx(spread, rel=0.4)


def test_bias_of_the_frechet_distance_is_what_few_images_add(generator):
    real = Statistics.of(normal(generator, 20_000, 6))
    draws = [evaluate(images(normal(generator, 100, 6)), real, flat) for _ in range(20)]
    values = np.mean([draw["frechet"] for draw in draws])
    biases = np.mean([draw.figures["frechet"].bias for draw in draws])
    assert biases == pytest.approx(values, rel=0.3)  # endless images of this model are at no distance


def test_images_reach_the_features_as_given():
    seen = []

    def features(batch):
        seen.append((batch.dtype, tuple(batch.shape)))
        return batch.flatten(1).double()[:, :4]

    a = torch.randint(0, 256, (10, 1, 4, 4), dtype=torch.uint8)
    evaluate(a, ImageData(a), features, batch_size=4)
    assert seen == 2 * [(torch.uint8, (4, 1, 4, 4)), (torch.uint8, (4, 1, 4, 4)), (torch.uint8, (2, 1, 4, 4))]
    seen.clear()
    evaluate(iter(a.split(5)), (batch for batch in a.split(2)), features)
    assert [shape[0] for _, shape in seen] == [5, 5, 2, 2, 2, 2, 2]


def test_statistics_are_kept_as_pytorch_fid_does(tmp_path, generator):
    a, b = normal(generator, 50, 3), normal(generator, 60, 3)
    Statistics.of(b).save(tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as file:
        np.testing.assert_allclose(file["mu"], b.numpy().mean(0))
        np.testing.assert_allclose(file["sigma"], np.cov(b.numpy(), rowvar=False))
    against = Statistics.load(tmp_path / "b.npz")
    found = evaluate(images(a), against, flat)
    assert list(found) == ["frechet"]
    assert found["frechet"] == pytest.approx(evaluate(images(a), images(b), flat)["frechet"], rel=1e-9)
    assert found.reference_images == 60
    np.savez(tmp_path / "theirs.npz", mu=b.numpy().mean(0), sigma=np.cov(b.numpy(), rowvar=False))
    assert Statistics.load(tmp_path / "theirs.npz").count is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "with mu .* and sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"got \[3\] and \[2, 2\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "NaN or infinite"),
        ({"mu": np.array([None, None]), "sigma": np.eye(2)}, "with mu .* and sigma"),
        (None, "with mu .* and sigma"),
    ],
)
def test_statistics_refuse_other_files(arrays, message, tmp_path):
    path = tmp_path / "statistics.npz"
    path.write_bytes(b"no archive") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"statistics.npz .*{message}"):
        Statistics.load(path)


A = torch.zeros(8, 1, 2, 2)
NAN, NINE = A.clone(), torch.zeros(9, 1, 3, 3)
NAN[5] = torch.nan


@pytest.mark.parametrize(
    ("given", "against", "features", "message"),
    [
        (A[:1], A, flat, "images must be more than 3 images for k=3, got 1"),
        (A, A[:3], flat, "against must be more than 3 images for k=3, got 3"),
        (NAN, A, flat, "image 5 of images has a value that is NaN or infinite"),
        (A, NAN.split(2), flat, "image 5 of against has a value that is NaN or infinite"),
        ([A, A[..., :1]], A, flat, r"of one size, got \[1, 2, 2\] and, from image 8 on, \[1, 2, 1\]"),
        (NINE, NINE[:8], flat, r"against must be at least as many as .* \(9\), got 8"),
        (A, torch.zeros(8, 1, 1, 1), flat, "images have 4 features and against has 1"),
        (A[0], A, flat, r"images must be \[N, C, H, W\], got shape \[1, 2, 2\]"),
        ([], A, flat, "images must hold at least one image"),
        (A, A, lambda batch: batch[:1].flatten(1), r"must return \[8, D\] for 8 images of images, got \[1, 4\]"),
        (A, A, lambda batch: flat(batch) / 0, "the features of image 0 of images are NaN or infinite"),
        (A, A, lambda batch: flat(batch).sum(1), r"features must return \[8, D\]"),
        (NINE[:8], NINE, flat, r"images must be at least as many as .* \(9\), got 8"),
        (A, Statistics(torch.zeros(3), torch.eye(3), None), flat, "images have 4 features and against has 3"),
    ],
)  # fmt: skip
def test_bad_input_is_named(given, against, features, message):
    with pytest.raises(ValueError, match=message):
        evaluate(given, against, features)


def test_too_few_images_are_refused_before_any_feature_is_computed():
    with pytest.raises(ValueError, match="against must be more than 3"):
        evaluate(A, A[:2], lambda batch: pytest.fail("computed"))


@pytest.mark.parametrize(
    ("given", "features", "message"),
    [
        ("folder", flat, "images must be a tensor, ImageData or an iterable of batches, got str"),
        ([A.numpy()], flat, "the batches of images must be tensors, got ndarray"),
        (A, lambda batch: flat(batch).long(), r"floating-point tensors, got torch\.int64"),
        (A, lambda batch: None, "floating-point tensors, got NoneType"),
    ],
)
def test_wrong_kinds_are_named(given, features, message):
    with pytest.raises(TypeError, match=message):
        evaluate(given, A, features)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x.flatten(1).float())


@pytest.fixture
def module(monkeypatch):
    """An importable module of a user's."""
    made = ModuleType("users_features")
    made.Small, made.flat, made.number = Small, flat, 3
    monkeypatch.setitem(sys.modules, "users_features", made)


@pytest.mark.usefixtures("module")
def test_features_are_found_by_name(tmp_path):
    from safetensors.torch import save_file

    network = Small().eval()
    batch = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(batch)
    torch.jit.trace(network, batch).save(tmp_path / "traced.pt")
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    torch.export.save(
        torch.export.export(network, (batch,), dynamic_shapes=shapes), tmp_path / "exported.pt2"
    )
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    in_python = f"users_features:Small@{tmp_path}/weights.safetensors"
    for source in (tmp_path / "traced.pt", tmp_path / "exported.pt2", in_python):
        with torch.no_grad():
            torch.testing.assert_close(load_features(source)(batch), expected)
    assert torch.equal(load_features("users_features:flat")(batch), flat(batch))


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet", "unknown 'resnet'; allowed are inception"),
        ("missing.pt", "missing.pt is no file"),
        ("no_such_module:name", "'no_such_module:name' cannot be imported"),
        ("users_features:other", "'users_features:other' cannot be imported"),
        (
            "users_features:flat@x.safetensors",
            "only a module takes weights, and 'users_features:flat' is a function",
        ),
        ("users_features:Small@x.safetensors", "x.safetensors does not fit Small"),
        ("users_features:number", "'users_features:number' must be a function or a module, got int"),
    ],
)
def test_features_that_cannot_be_found_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_features(source)


def test_damaged_networks_are_named(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"net\.pt cannot be read as TorchScript file"):
        load_features(tmp_path / "net.pt")


def test_inception_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r'pip install "msd-kernels\[evaluation\]"'):
        load_features("inception")
    package, extractor = (
        ModuleType("torch_fidelity"),
        ModuleType("torch_fidelity.feature_extractor_inceptionv3"),
    )
    extractor.URL_INCEPTION_V3 = "https://example.org/weights.pth"
    extractor.FeatureExtractorInceptionV3 = None
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", extractor)
    with pytest.raises(
        ValueError, match=r"are not at .*weights.pth; fetch them from https://example.org/weights.pth"
    ):
        load_features(f"inception:{tmp_path}/weights.pth")
