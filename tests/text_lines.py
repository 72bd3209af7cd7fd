"""Images of lines of text, upright or upside down, as the model of `requirements-trained.txt` takes them."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

HEIGHT, WIDTH = 48, 192
SENTENCE = (
    "Training deep neural networks is complicated by the fact that the distribution of each layer's inputs "
    "changes during training, as the parameters of the previous layers change. This slows down the training "
    "by requiring lower learning rates and careful parameter initialization"
)


def render(text, size, family):
    """A line of text as an array of HEIGHT rows, black on white, in 0 to 1."""
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.02, 0.5, text, va="center", fontproperties=FontProperties(family=family, size=size))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].mean(axis=2) / 255


def lines(rng, number):
    """Images (number, 3, 48, 192) in -1 to 1 and labels, 1 for those upside down."""
    assert matplotlib.get_data_path()  # has the fonts
    words, images, labels = SENTENCE.split(), [], []
    for k in range(number):
        start = rng.integers(len(words) - 2)
        text = " ".join(words[start : start + 2])
        image = render(text, rng.uniform(14, 18), ("DejaVu Sans", "DejaVu Serif")[k % 2])
        label = rng.integers(2)
        images.append(image[::-1, ::-1] if label else image)
        labels.append(label)
    x = (np.array(images)[:, None].repeat(3, axis=1) - 0.5) / 0.5
    return x.astype(np.float32), np.array(labels)
