import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.data.images import DataError, ImageData, load_images


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def colour_folder(tmp_path):
    pixels = random_pixels(3, 8, 8, 3)
    write_png(tmp_path / "b.png", pixels[1])
    write_png(tmp_path / "a" / "z.png", pixels[0])
    write_png(tmp_path / "c.BMP", pixels[2])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.png").write_bytes(b"a hidden file, no image")
    return tmp_path, pixels


def test_digits_are_all_there_with_labels():
    data = load_images("digits")
    assert (data.num_images, data.channels, data.image_size) == (1797, 1, 16)
    assert data.images.dtype == torch.uint8
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (int(data.images.min()), int(data.images.max())) == (0, 255)


def test_digits_at_their_own_size_are_the_scanned_values():
    from sklearn.datasets import load_digits

    expected = load_digits().images / 16 * 2 - 1
    sampled = load_images("digits", image_size=8).sample(range(1797))[:, 0].numpy()
    assert np.abs(sampled - expected).max() <= 1 / 255 + 1e-6  # eight bits round by half a level of 2/255


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"msd-kernels\[digits\]"):
        load_images("digits")


def test_folder_is_read_recursively_in_order_of_paths(colour_folder):
    folder, pixels = colour_folder
    data = load_images(folder)
    assert np.array_equal(data.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert data.labels is None
    assert data.name == folder.stem


def test_zip_gives_the_same_images_as_the_folder(colour_folder, tmp_path):
    folder, _ = colour_folder
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            if file.name != "images.zip":
                archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/b.png", b"no image")
    assert load_images(tmp_path / "images.zip").fingerprint == load_images(folder).fingerprint


def test_greyscale_folder_has_one_channel_until_a_colour_image_joins(tmp_path):
    grey = random_pixels(8, 8)
    write_png(tmp_path / "a.png", grey)
    assert np.array_equal(load_images(tmp_path).images.numpy(), grey[None, None])
    write_png(tmp_path / "b.png", random_pixels(8, 8, 3))
    assert np.array_equal(load_images(tmp_path).images[0].numpy(), np.stack([grey] * 3))


def test_folder_is_resized_with_lanczos(tmp_path):
    write_png(tmp_path / "a.png", random_pixels(12, 12, 3))
    write_png(tmp_path / "b.png", random_pixels(20, 20, 3))
    with Image.open(tmp_path / "b.png") as image:
        expected = np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    data = load_images(tmp_path, image_size=8)
    assert data.image_size == 8
    assert np.array_equal(data.images[1].numpy(), expected)


def test_images_of_different_sizes_are_both_named(tmp_path):
    write_png(tmp_path / "a.png", random_pixels(8, 8))
    write_png(tmp_path / "b.png", random_pixels(9, 9))
    with pytest.raises(DataError, match=r"a\.png is 8x8, b\.png is 9x9.*image_size"):
        load_images(tmp_path)


@pytest.mark.parametrize("image_size", [None, 8])
def test_non_square_image_is_refused(tmp_path, image_size):
    write_png(tmp_path / "a.png", random_pixels(8, 10))
    with pytest.raises(DataError, match=r"a\.png .* is 10x8; images must be square"):
        load_images(tmp_path, image_size=image_size)


def test_sixteen_bit_image_is_refused(tmp_path):
    write_png(tmp_path / "a.png", np.full((8, 8), 40000, np.uint16))
    with pytest.raises(DataError, match=r"a\.png .*8 bits"):
        load_images(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 60, 400])
def test_corrupt_image_is_named(tmp_path, kept_bytes):
    write_png(tmp_path / "good.png", random_pixels(16, 16, 3))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:kept_bytes])
    with pytest.raises(DataError, match=r"torn\.png"):
        load_images(tmp_path)


def test_corrupt_member_of_a_zip_is_named(tmp_path):
    image = io.BytesIO()
    Image.fromarray(random_pixels(16, 16)).save(image, "PNG")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("good.png", image.getvalue())
        archive.writestr("torn.png", image.getvalue()[:100])
    with pytest.raises(DataError, match=r"torn\.png"):
        load_images(tmp_path / "images.zip")


def test_missing_empty_and_unknown_sources_say_what_is_allowed(tmp_path):
    with pytest.raises(DataError, match=r"does not exist.*\.npz"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no images.*\.png"):
        load_images(tmp_path)
    (tmp_path / "images.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"\.tar file; allowed are"):
        load_images(tmp_path / "images.tar")
    with pytest.raises(TypeError, match="got ndarray"):
        load_images(np.zeros((2, 1, 8, 8)))


@pytest.mark.parametrize("suffix", [".zip", ".npy", ".npz"])
@pytest.mark.parametrize("content", [b"", b"nothing of that kind" * 20, b"PK\x03\x04torn"])
def test_corrupt_archive_is_a_data_error(tmp_path, suffix, content):
    path = tmp_path / f"images{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"images{suffix}"):
        load_images(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_truncated_array_is_a_data_error(tmp_path, suffix):
    path = tmp_path / f"images{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, random_pixels(8, 16, 16, 3))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=f"images{suffix}"):
        load_images(path)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 8, 8, 3), (5, 1, 8, 8), (5, 4, 4, 3), (5, 3, 4, 4)])
def test_npy_layout_is_recognised(tmp_path, shape):
    pixels = random_pixels(*shape)
    np.save(tmp_path / "images.npy", pixels)
    channels_first = pixels if shape[2] == shape[3] else pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(load_images(tmp_path / "images.npy").images.numpy(), channels_first)


def test_npy_layouts_have_one_fingerprint(tmp_path):
    pixels = random_pixels(5, 8, 8, 3)
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", pixels.transpose(0, 3, 1, 2).copy())
    assert load_images(tmp_path / "last.npy").fingerprint == load_images(tmp_path / "first.npy").fingerprint


def test_npy_is_mapped_and_never_written(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((4, 1, 8, 8), np.uint8))
    before = path.read_bytes()
    mapped = load_images(path)
    mapped.images.fill_(7)
    assert path.read_bytes() == before

    np.lib.format.open_memmap(path, mode="r+")[:] = 9
    assert int(load_images(path).images.min()) == 9
    untouched = load_images(path)
    np.lib.format.open_memmap(path, mode="r+")[:] = 3  # a copy would not see this
    assert int(untouched.sample([0]).mul(127.5).add(127.5).round().max()) == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 3, 3, 3), r"could be \[N, C, H, W\] or \[N, H, W, C\]"),
        ((5, 3, 8, 10), "square"),
        ((5, 8, 8, 2), r"C one of \(1, 3, 4\)"),
        ((5, 8, 8), "4-dimensional"),
        ((0, 3, 8, 8), "holds no images|images.npy"),
    ],
)
def test_npy_of_another_shape_is_refused(tmp_path, shape, message):
    np.save(tmp_path / "images.npy", np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "images.npy")


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, "U3"])
def test_npy_of_another_dtype_is_refused(tmp_path, dtype):
    np.save(tmp_path / "images.npy", np.zeros((2, 1, 8, 8), dtype))
    with pytest.raises(DataError, match="allowed are uint8"):
        load_images(tmp_path / "images.npy")


def test_pickles_are_never_loaded(tmp_path):
    objects = np.empty((2, 1, 8, 8), object)
    np.save(tmp_path / "images.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "images.npz", images=objects)
    for name in ("images.npy", "images.npz"):
        with pytest.raises(DataError, match="never loaded"):
            load_images(tmp_path / name)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.9, 0.3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_images_are_scaled_to_minus_one_to_one(tmp_path, low, high, dtype):
    values = np.linspace(low, high, 2 * 64).reshape(2, 1, 8, 8).astype(dtype)
    np.save(tmp_path / "images.npy", values)
    expected = values.astype(np.float32)
    expected = expected if low < 0 else 2 * expected - 1
    sampled = load_images(tmp_path / "images.npy").sample([1, 0])
    assert sampled.dtype == torch.float32
    np.testing.assert_allclose(sampled.numpy(), expected[::-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "image 2 .*NaN"),
        (np.inf, "image 2 .*infinite"),
        (1.5, r"got 0 to 1\.5"),
        (-0.02, "neither"),
    ],
)
def test_float_images_with_wrong_values_are_refused(tmp_path, value, message):
    values = np.zeros((4, 1, 8, 8), np.float32)
    values[2, 0, 3, 3] = value
    np.save(tmp_path / "images.npy", values)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "images.npy")


def test_npz_takes_images_and_labels(tmp_path):
    pixels, labels = random_pixels(3, 8, 8, 3), np.array([2, 0, 1], np.uint8)
    np.savez(tmp_path / "named.npz", images=pixels, labels=labels, other=np.zeros(3))
    np.savez_compressed(tmp_path / "only.npz", pixels, labels=labels)
    named, only = load_images(tmp_path / "named.npz"), load_images(tmp_path / "only.npz")
    assert np.array_equal(named.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert named.labels.tolist() == [2, 0, 1]
    assert only.fingerprint == named.fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": random_pixels(2, 1, 8, 8), "b": random_pixels(2, 1, 8, 8)}, r"it holds \['a', 'b'\]"),
        ({"images": random_pixels(2, 1, 8, 8), "labels": np.zeros(3, int)}, "must be 2 integers"),
        ({"images": random_pixels(2, 1, 8, 8), "labels": np.zeros(2)}, "labels .* must be integers"),
    ],
)
def test_npz_with_wrong_arrays_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "images.npz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.array([0, -1, -1]),
            r"2 of the labels of images are no classes, label 1 is -1; allowed are 0 to 2\^63 - 1",
        ),
        (np.array([0, 1, 2**64 - 5], np.uint64), "label 2 is 18446744073709551611"),
        (np.array([-7, 0, 1], ">i2"), "label 0 is -7"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, message):
    np.savez(tmp_path / "images.npz", images=random_pixels(3, 1, 8, 8), labels=labels)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "images.npz")
    native = torch.from_numpy(labels.astype(labels.dtype.newbyteorder("=")))
    with pytest.raises(DataError, match=message):
        ImageData(torch.zeros(3, 1, 8, 8), native)


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", ">u4", "<u8"])
def test_labels_of_any_integer_type_keep_their_values(tmp_path, dtype):
    np.savez(tmp_path / "images.npz", images=random_pixels(3, 1, 8, 8), labels=np.array([3, 0, 200], dtype))
    labels = load_images(tmp_path / "images.npz").labels
    assert (labels.dtype, labels.tolist()) == (torch.int64, [3, 0, 200])


def test_arrays_are_not_resized(tmp_path):
    np.save(tmp_path / "images.npy", random_pixels(2, 1, 8, 8))
    assert load_images(tmp_path / "images.npy", image_size=8).image_size == 8
    with pytest.raises(DataError, match="8x8, given image_size=16"):
        load_images(tmp_path / "images.npy", image_size=16)


@pytest.mark.parametrize(("image_size", "error"), [(0, DataError), (8.0, TypeError), (True, TypeError)])
def test_wrong_image_size_is_refused(image_size, error):
    with pytest.raises(error, match="image_size"):
        load_images("digits", image_size=image_size)


def test_sample_scales_eight_bits_and_keeps_the_order():
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    sampled = ImageData(images).sample([3, 0, 3])
    assert sampled.is_contiguous()
    expected = images[[3, 0, 3]].double() / 127.5 - 1
    torch.testing.assert_close(
        sampled.double(), expected, rtol=0, atol=1e-7
    )  # float32 in [-1, 1] rounds by 6e-8


@pytest.mark.parametrize("indices", [torch.tensor([1, 2]), np.array([1, 2], np.int32), [1, 2], range(1, 3)])
def test_sample_takes_any_integers(indices):
    data = ImageData(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2))
    assert data.sample(indices).shape == (2, 1, 2, 2)
    assert data.sample(indices)[:, 0, 0, 0].add(1).mul(127.5).round().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("indices", "error"),
    [([4], DataError), ([-1], DataError), ([[0]], DataError), ([0.5], TypeError), ([True], TypeError)],
)
def test_sample_refuses_wrong_indices(indices, error):
    with pytest.raises(error, match="indices"):
        ImageData(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)).sample(indices)


def test_split_parts_are_disjoint_and_complete():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    data = ImageData(images, torch.arange(100))
    first, rest = data.split(0.3, seed=1)
    assert (first.num_images, rest.num_images) == (30, 70)
    assert sorted(first.labels.tolist() + rest.labels.tolist()) == list(range(100))
    for part in (first, rest, rest.split(0.5, seed=0)[1]):
        assert part.images.flatten().tolist() == part.labels.tolist()
        sampled = part.sample(range(part.num_images)).flatten()
        assert sampled.add(1).mul(127.5).round().long().tolist() == part.labels.tolist()


def test_split_depends_on_the_seed_alone():
    data = load_images("digits")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    parts = [data.split(0.5, seed)[0].fingerprint for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 0.01])
def test_split_refuses_an_empty_part(fraction):
    with pytest.raises(DataError, match="fraction"):
        ImageData(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)).split(fraction, 0)


def test_split_part_keeps_the_range_of_the_whole():
    images = torch.full((2, 1, 2, 2), 0.5)
    images[0] = -1
    for part in ImageData(images).split(0.5, 0):
        assert float(part.sample([0]).max()) in (-1.0, 0.5)


def test_fingerprint_tells_content_not_name():
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    fingerprint = ImageData(images, name="a").fingerprint
    assert fingerprint == ImageData(images.clone(), name="b").fingerprint
    others = [images.flip(0), images.view(1, 4, 8, 8), images.clone().index_fill_(0, torch.tensor(3), 1)]
    assert len({fingerprint, *(ImageData(other).fingerprint for other in others)}) == 4
    assert ImageData(images, torch.zeros(4, dtype=torch.int64)).fingerprint != fingerprint


def fingerprint_of(images, labels=None, **options):
    return ImageData(images, None if labels is None else torch.tensor(labels), **options).fingerprint


@pytest.mark.parametrize(
    ("labels", "same"),
    [
        ([0, 1, 2, 1], True),
        ([0, 1, 2, 2], False),
        ([1, 0, 2, 1], False),
        ([0, 0, 0, 0], False),
        ([3, 4, 5, 4], False),
        (None, False),
    ],
)
def test_fingerprint_tells_the_values_of_the_labels(labels, same):
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    assert (fingerprint_of(images, [0, 1, 2, 1]) == fingerprint_of(images, labels)) == same
    assert fingerprint_of(images, [0, 1, 2, 1]) == fingerprint_of(images.clone(), [0, 1, 2, 1], name="other")


def test_fingerprint_of_labels_does_not_depend_on_their_type(tmp_path):
    images, found = random_pixels(3, 1, 8, 8), set()
    for dtype in ("u1", "<i2", ">i8"):
        np.savez(tmp_path / "images.npz", images=images, labels=np.array([2, 0, 1], dtype))
        found.add(load_images(tmp_path / "images.npz").fingerprint)
    assert len(found) == 1


def test_fingerprint_tells_order_type_size_and_kind_of_the_images():
    """The bytes of some of these are the same."""
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    order = torch.tensor([0, 2, 1, 3])
    as_bytes = torch.from_numpy(images.numpy().view(np.uint8).reshape(4, 1, 16, 16))
    others = [
        fingerprint_of(images),
        fingerprint_of(images[order]),
        fingerprint_of(images, values="latents"),
        fingerprint_of(as_bytes),
        fingerprint_of(as_bytes.view(16, 1, 8, 8)),
        fingerprint_of(as_bytes.view(4, 4, 8, 8)),
        fingerprint_of(images.view(1, 4, 8, 8)),
        fingerprint_of(images[:3]),
        fingerprint_of(images, [0, 1, 2, 3]),
        fingerprint_of(images[order], [0, 1, 2, 3]),
        fingerprint_of(images[order], [0, 2, 1, 3]),
    ]
    assert len(set(others)) == len(others)


def test_fingerprint_of_a_part_is_that_of_its_images_and_labels():
    images = torch.arange(640, dtype=torch.int64).view(10, 1, 8, 8).to(torch.uint8)
    part, _ = ImageData(images, torch.arange(10)).split(0.4, seed=0)
    assert part.fingerprint == fingerprint_of(part.images.clone(), part.labels.tolist())
    assert part.fingerprint != fingerprint_of(part.images.clone(), part.labels.flip(0).tolist())


# ------------------------------------------------------------------ latents


def random_latents(*shape, seed=0):
    return (4 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_latents_are_handed_out_as_they_are(tmp_path, channels):
    latents = random_latents(6, channels, 8, 8)
    np.save(tmp_path / "latents.npy", latents)
    data = load_images(tmp_path / "latents.npy", values="latents")
    assert (data.num_images, data.channels, data.image_size) == (6, channels, 8)
    assert (data.values, data.value_range) == ("latents", None)
    assert np.array_equal(data.sample([4, 0]).numpy(), latents[[4, 0]])
    assert "6 latents" in repr(data)


def test_latents_in_the_range_of_images_are_not_scaled():
    values = torch.rand(4, 3, 2, 2)
    assert torch.equal(ImageData(values, values="latents").sample(range(4)), values)
    torch.testing.assert_close(ImageData(values).sample(range(4)), 2 * values - 1)


def test_parts_of_latents_are_latents():
    latents = torch.from_numpy(random_latents(10, 2, 4, 4))
    first, rest = ImageData(latents, torch.arange(10), values="latents").split(0.3, seed=1)
    for part in (first, rest):
        assert (part.values, part.value_range) == ("latents", None)
        assert torch.equal(part.sample(range(len(part))), latents[part.labels])


def test_npz_takes_latents_and_labels(tmp_path):
    latents, labels = random_latents(3, 4, 8, 8), np.array([2, 0, 1])
    np.savez(tmp_path / "named.npz", latents=latents, labels=labels, seeds=np.arange(3))
    np.savez(tmp_path / "only.npz", latents.astype(np.float64), labels=labels)
    named, only = (load_images(tmp_path / f"{name}.npz", values="latents") for name in ("named", "only"))
    assert np.array_equal(named.images.numpy(), latents)
    assert only.images.dtype == torch.float32
    assert named.labels.tolist() == [2, 0, 1]
    assert named.fingerprint == only.fingerprint


def test_fingerprint_tells_latents_from_images():
    values = torch.rand(4, 3, 2, 2)
    assert ImageData(values, values="latents").fingerprint != ImageData(values).fingerprint


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (random_latents(2, 8, 8, 3), r"latents is \[N, C, H, W\], channels first, with H = W"),
        (random_latents(2, 4, 8), r"shape \[2, 4, 8\]; allowed for latents"),
        (random_pixels(2, 4, 8, 8), "holds uint8 values; allowed are floating point, for latents"),
        (np.full((3, 4, 8, 8), np.nan, np.float32), "latent 0 of latents has a value that is NaN"),
        (np.full((3, 4, 8, 8), np.inf, np.float16), "latent 0 of latents .* infinite"),
        (random_latents(0, 4, 8, 8), "holds no latents"),
    ],
)
def test_wrong_latents_are_refused(tmp_path, array, message):
    np.save(tmp_path / "latents.npy", array)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "latents.npy", values="latents")


def test_latents_are_arrays_and_are_not_resized(tmp_path):
    for source in ("digits", tmp_path, tmp_path / "images.zip"):
        with pytest.raises(
            DataError, match=r"latents are floating-point arrays in a \.npy or \.npz file, got"
        ):
            load_images(source, values="latents")
    np.save(tmp_path / "latents.npy", random_latents(2, 4, 8, 8))
    with pytest.raises(DataError, match="holds latents of 8x8, given image_size=16"):
        load_images(tmp_path / "latents.npy", values="latents", image_size=16)
    with pytest.raises(DataError, match="does not exist"):
        load_images(tmp_path / "nowhere.npy", values="latents")


def test_wrong_latent_tensors_and_unknown_values_are_refused():
    with pytest.raises(DataError, match=r"must be float32, for latents, got torch\.uint8"):
        ImageData(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), values="latents")
    with pytest.raises(DataError, match=r"\[N, C, H, W\] with H = W, got shape \[1, 4, 2, 3\]"):
        ImageData(torch.zeros(1, 4, 2, 3), values="latents")
    for make in (
        lambda: ImageData(torch.zeros(1, 1, 2, 2), values="sounds"),
        lambda: load_images("x", values="?"),
    ):
        with pytest.raises(DataError, match="values must be one of images, latents, got"):
            make()
