"""preprocessor_config.json -> the shapes that a processor gives, where they are its own choice."""

from pathlib import Path

from ...errors import BaseModelError
from ..config_file import ConfigFile

PREPROCESSOR = "preprocessor_config.json"


def image_size(directory: Path) -> tuple[int, int] | None:
    """(height, width) of the images that a processor makes; None where it does not say, or images
    keep their own.

    Raises:
        BaseModelError: the file is broken.
    """
    file = ConfigFile.read(directory / PREPROCESSOR)
    crops = file.flag("do_center_crop", "crop_size" in file.values)
    key = "crop_size" if crops else "size"
    if not crops and not file.flag("do_resize", True):
        return None
    size = file.values.get(key)
    if isinstance(size, dict):
        inner = ConfigFile(file.path, size)
        height, width = inner.number("height"), inner.number("width")
        return None if height is None or width is None else (height, width)
    # One number is the shorter side's alone where nothing is cropped, in processors that resize so.
    number = file.number(key)
    return None if number is None else (number, number)


def num_frames(directory: Path) -> int:
    """The frames of a spectrogram of the longest sound that a processor takes, as CLAP's does.

    Raises:
        BaseModelError: the file is not there, broken, or does not say.
    """
    file = ConfigFile.read(directory / PREPROCESSOR)
    if not file.values:
        raise BaseModelError(
            f"{file.path}: not there, and it says how many frames a spectrogram has, which the"
            " graph's input is of; download the base with its processor"
        )
    samples, hop = file.number("nb_max_samples"), file.size("hop_length")
    if samples is None:
        samples = file.size("max_length_s") * file.size("sampling_rate")
    return samples // hop + 1
