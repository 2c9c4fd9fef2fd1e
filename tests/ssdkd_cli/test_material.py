import tracemalloc

import numpy as np

from ssdkd_cli.material import smooth_noise


def test_smooth_noise_takes_little_more_memory_than_its_images() -> None:
    tracemalloc.start()
    images = smooth_noise(16, (3, 128, 128))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 6 * images.nbytes


def test_smooth_noise_has_structure_and_is_always_the_same() -> None:
    images = smooth_noise(8, (3, 20, 30))
    assert images.shape == (8, 20, 30, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, smooth_noise(8, (3, 20, 30)))
    neighbours = np.abs(np.diff(images.astype(int), axis=2)).mean()
    strangers = np.abs(images[:, :, :15].astype(int) - images[:, :, 15:].astype(int)).mean()
    assert neighbours < 0.8 * strangers
    assert images.reshape(8, -1).std(1).min() > 20
