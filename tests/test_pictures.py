import errno
import json
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from utils.config import written
from utils.data import to_pixels
from utils.pictures import log_scale, pyplot, sample_labels, save_curves, save_gif, save_grid


@pytest.mark.parametrize(
    ("num_classes", "expected"),
    [(10, range(10)), (3, range(3)), (1, range(1)), (100, range(10))],
)
def test_one_row_of_the_grid_for_each_of_the_first_ten_classes(num_classes, expected):
    labels = sample_labels(num_classes)
    assert labels.tolist() == [label for label in expected for _ in range(10)]
    assert labels.dtype == torch.long


def test_without_classes_the_grid_is_full_of_the_null_class():
    assert sample_labels(0).tolist() == [0] * 100


def test_rows_and_columns():
    assert sample_labels(5, rows=2, columns=3).tolist() == [0, 0, 0, 1, 1, 1]


def cells(picture: np.ndarray, size: int, columns: int, num: int) -> np.ndarray:
    """The images in a grid, read back: every pixel must be a block of one value. (num, size, size, 3)."""
    padding = max(1, size // 16)
    factor = picture.shape[1] // (columns * (size + padding) + padding)
    small = picture[::factor, ::factor]
    assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), picture)
    corners = [(padding + (size + padding) * (i // columns), padding + (size + padding) * (i % columns)) for i in range(num)]
    return np.stack([small[top : top + size, left : left + size] for top, left in corners])


@pytest.mark.parametrize(("size", "channels", "num"), [(8, 1, 12), (8, 3, 10), (28, 1, 20), (32, 3, 7), (64, 3, 3)])
def test_grid_shows_every_pixel_as_it_is(tmp_path, draw, size, channels, num):
    """Row by row, values beyond [-1, 1] clipped, small images enlarged to at least 48 pixels without smoothing."""
    x = 1.5 * torch.randn(num, channels, size, size, generator=draw)
    path = tmp_path / "new folder" / "grid.png"
    save_grid(path, x, columns=min(num, 5))
    picture = imageio.imread(path)
    expected = to_pixels(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    assert np.array_equal(cells(picture, size, min(num, 5), num), expected)
    assert picture.shape[1] / min(num, 5) >= 48


def test_gif_has_a_frame_for_each_state(tmp_path):
    """Noise first, rests on the last frame, and starts again for ever."""
    trajectory = torch.linspace(-1, 1, 6).view(6, 1, 1, 1, 1) * torch.ones(6, 4, 1, 8, 8)
    save_gif(tmp_path / "a.gif", trajectory, columns=2, seconds=2.4)
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 6 and file.info["loop"] == 0
        values, durations = [], []
        for i in range(6):
            file.seek(i)
            values.append(np.asarray(file.convert("L"))[20, 20])
            durations.append(file.info["duration"])
    assert values == pytest.approx([0, 51, 102, 153, 204, 255], abs=3)
    assert durations == [400] * 5 + [1500]


def test_gif_of_one_step(tmp_path, draw):
    save_gif(tmp_path / "a.gif", torch.randn(2, 4, 3, 8, 8, generator=draw))
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 2


def test_gif_whose_states_are_alike_lasts_as_long(tmp_path, draw):
    """Encoders join equal frames: then the joined one is shown for the time of both."""
    state = torch.randn(1, 4, 1, 8, 8, generator=draw)
    save_gif(tmp_path / "a.gif", torch.cat([state, state, -state]), seconds=3)
    with Image.open(tmp_path / "a.gif") as file:
        durations = []
        for i in range(file.n_frames):
            file.seek(i)
            durations.append(file.info["duration"])
    assert sum(durations) == 1000 + 1000 + 1500


def metrics(path, num: int):
    rows = [dict(step=i, loss=1 / i, boundary=2 / i, grad_norm=0.5, learning_rate=1e-3, images_per_second=9.0, seconds=i)
            for i in range(1, num + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_curves_are_drawn(tmp_path):
    """As a PNG, and other numbers make another picture."""
    pictures = []
    for num in (2, 9):
        metrics(tmp_path / "metrics.jsonl", num)
        save_curves(tmp_path / "curves.png", tmp_path)
        pictures.append(imageio.imread(tmp_path / "curves.png"))
    assert pictures[0].shape == pictures[1].shape and pictures[0].std() > 5
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize(("low", "high"), [(0.31, 0.39), (0.9, 2.2), (0.15, 0.3), (3_000, 9_900), (0.002, 0.7), (1e-4, 50)])
def test_logarithmic_axes_have_numbers(low, high):
    plt = pyplot()
    figure, axis = plt.subplots()
    axis.plot([0, 1], [low, high])
    log_scale(axis)
    figure.canvas.draw()
    texts = [label.get_text().replace("\N{MINUS SIGN}", "-").replace(",", "") for label in axis.get_yticklabels()]
    shown = [float(text) for text in texts if text]
    assert sum(low / 1.1 < number < high * 1.1 for number in shown) >= 2
    plt.close(figure)


def test_no_metrics_no_curves(tmp_path):
    metrics(tmp_path / "metrics.jsonl", 0)
    save_curves(tmp_path / "curves.png", tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, draw):
    def cut_short(file, *_, **__):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    images = torch.randn(2, 4, 3, 8, 8, generator=draw)
    save_grid(tmp_path / "a.png", images[0])
    whole = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(imageio, "imwrite", cut_short)
    for save, path, x in ((save_grid, tmp_path / "a.png", images[1]), (save_gif, tmp_path / "a.gif", images)):
        with pytest.raises(OSError, match=f"could not write {path}: .*No space left"):
            save(path, x)
    with pytest.raises(KeyboardInterrupt), written(tmp_path / "a.npz") as file:
        file.touch()
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == whole
