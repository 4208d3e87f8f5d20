"""Photographs that scikit-image's package carries, and clips made from them.

Training and test material come from different photographs, never from other crops of the same.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN = (
    "astronaut.png",
    "brick.png",
    "cell.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
)
TEST = ("camera.png", "chelsea.png", "rocket.jpg")

FPS = 8.0
SHORT_SIDE = 256  # of the training photographs; crops of a quarter of it are 64 pixels wide
CLIP_SIZE = 192  # of the training clips, whose camera sees half to all of a photograph
CLIP_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Samples:
    """Where the material was written.

    - `train`: folder of photographs and clips to train on.
    - `pictures`: test pictures by name, all of one size.
    - `clip`: a test clip, `[frames height width 3]`.
    - `cuts`: first frames of the test clip's scenes, without frame 0.
    """

    train: Path
    pictures: dict[str, np.ndarray]
    clip: np.ndarray
    cuts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A square camera window on a photograph: its middle and width in pixels."""

    photo: np.ndarray
    x: float
    y: float
    width: float

    def moved(self, dx: float, dy: float, zoom: float) -> "View":
        """The window shifted by parts of its width, and scaled, kept inside the photograph."""
        height, width = self.photo.shape[:2]
        side = float(np.clip(self.width * zoom, 32, min(height, width)))
        x = float(np.clip(self.x + dx * self.width, side / 2, width - side / 2))
        y = float(np.clip(self.y + dy * self.width, side / 2, height - side / 2))
        return View(self.photo, x, y, side)

    def frame(self, size: int) -> np.ndarray:
        """What the camera sees, `[size size 3]`."""
        half = self.width / 2
        box = (self.x - half, self.y - half, self.x + half, self.y + half)
        picture = Image.fromarray(self.photo)
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def photographs(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named photographs at their own size, as RGB.

    **Raises:** `FileNotFoundError` if the installed scikit-image does not carry one of them.
    """
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    photos = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"the installed scikit-image carries no {name}; the demo needs scikit-image 0.25 "
                "or newer from PyPI"
            )
        with Image.open(folder / name) as picture:
            photos[Path(name).stem] = np.asarray(picture.convert("RGB"))
    return photos


def write_samples(folder: Path, *, size: int, clips: int, seed: int) -> Samples:
    """Writes the training folder and makes the test material.

    **Arguments:**

    - `folder`: for `train/`, which is written anew.
    - `size`: of the test pictures and of the test clip.
    - `clips`: how many training clips.
    - `seed`: of the clips' camera movements and the test crops.
    """
    from elastictok.data import write_clip, write_picture

    train, test = photographs(TRAIN), photographs(TEST)
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for name, photo in train.items():
        height, width = photo.shape[:2]
        scale = SHORT_SIDE / min(height, width)
        shape = (round(width * scale), round(height * scale))
        picture = Image.fromarray(photo).resize(shape, Image.Resampling.LANCZOS)
        write_picture(folder / "train" / f"{name}.png", np.asarray(picture))
    rng = np.random.default_rng([seed, 0])
    for i in range(clips):
        frames = training_clip(list(train.values()), rng, frames=CLIP_FRAMES)
        write_clip(folder / "train" / f"clip-{i:03d}.mp4", frames, FPS)

    rng = np.random.default_rng([seed, 1])
    pictures = {
        f"{name}-{i:02d}": random_view(photo, rng, smallest=0.25).frame(size)
        for name, photo in test.items()
        for i in range(40)
    }
    clip, cuts = demo_clip(test, size)
    return Samples(folder / "train", pictures, clip, cuts)


def random_view(photo: np.ndarray, rng: np.random.Generator, *, smallest: float) -> View:
    """A square window of that share to all of the short side, anywhere."""
    height, width = photo.shape[:2]
    side = min(height, width) * rng.uniform(smallest, 1.0)
    x, y = rng.uniform(side / 2, width - side / 2), rng.uniform(side / 2, height - side / 2)
    return View(photo, x, y, side)


def training_clip(photos: list[np.ndarray], rng: np.random.Generator, *, frames: int) -> np.ndarray:
    """A camera that holds, pans or zooms on a photograph, with a cut to another one and back."""
    chosen = rng.choice(len(photos), 2, replace=False)
    first, other = (random_view(photos[i], rng, smallest=0.5) for i in chosen)
    cut, back = np.sort(rng.choice(np.arange(4, frames - 3), 2, replace=False))
    shots, move = [], random_move(rng)
    for t in range(frames):
        if t in (cut, back):
            move = random_move(rng)
        view = other if cut <= t < back else first
        shots.append(view.frame(CLIP_SIZE))
        if cut <= t < back:
            other = other.moved(*move)
        else:
            first = first.moved(*move)
    return np.stack(shots)


def random_move(rng: np.random.Generator) -> tuple[float, float, float]:
    """Hold, pan or zoom, per frame: the shift in parts of the window, and the zoom."""
    kind = rng.integers(3)
    if kind == 0:
        return 0.0, 0.0, 1.0
    if kind == 1:
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.01, 0.05)
        return speed * np.cos(angle), speed * np.sin(angle), 1.0
    return 0.0, 0.0, rng.uniform(0.96, 1.04)


def demo_clip(photos: dict[str, np.ndarray], size: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The test clip and the first frame of each scene after the first.

    Cat: hold, pan; cut to the rocket: zoom out; cut back to the cat: hold; cut to the cameraman:
    pan; cut back to the rocket.
    """
    cat = View(photos["chelsea"], 215, 150, 240)
    rocket = View(photos["rocket"], 330, 210, 160)
    man = View(photos["camera"], 200, 150, 240)
    hold, pan, zoom = (0.0, 0.0, 1.0), (0.03, 0.01, 1.0), (0.0, 0.0, 1.03)
    script = [(cat, hold, 8), (None, pan, 8), (rocket, zoom, 8), (cat, hold, 8), (man, pan, 8)]
    script.append((rocket, hold, 8))
    frames, cuts = [], []
    view = cat
    for start, move, count in script:
        if start is not None:
            view = start
            if frames:
                cuts.append(len(frames))
        for _ in range(count):
            frames.append(view.frame(size))
            view = view.moved(*move)
    return np.stack(frames), tuple(cuts)
