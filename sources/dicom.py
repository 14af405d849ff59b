"""DICOM files as grey or colour images, where pydicom is installed.

What a file tells of its patient is neither printed nor stored: messages name the file and speak of
its pixels, and nothing is read of it but those, how to show them, and the modality.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image

from config import UserError, warn_once
from data import Image
from sources.packed import is_dicom

WINDOWS = {"soft": (40, 400), "brain": (40, 80), "lung": (-600, 1500)}  # of CT: centre, width, HU
FRAMES = ("first", "middle")
CODECS = "pip install pylibjpeg pylibjpeg-openjpeg pylibjpeg-libjpeg helps"
DEFAULT = "auto-first"  # --window and --frame


def pydicom(name: Path) -> ModuleType:
    """The package, without its warnings. Raises UserError where it is missing."""
    try:
        import pydicom as package
        import pydicom.pixels
    except ImportError as error:
        raise UserError(f"{name}: DICOM needs pydicom: pip install pydicom") from error
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    return package


@functools.cache
def modality(file: Path) -> str:
    """DICOM's code: "CT", "MR", "CR", ...; "" if there is none."""
    package = pydicom(file)
    try:
        tags = package.dcmread(file, force=True, specific_tags=["Modality"])
        return str(tags.get("Modality", "")).lower()
    except Exception:  # open_image gives the reason
        return ""


def viewed(image: Image | None, window: str, frame: str) -> Image | None:
    """A DICOM file with --window and --frame, as a path into it (packed.py)."""
    view = f"{window}-{frame}"
    if view == DEFAULT or not isinstance(image, Path) or not is_dicom(image):
        return image
    return image / view


def read(file: Path, view: str, check_size: Callable[[int, int], None]) -> PIL.Image.Image:
    """One frame: RGB or L as a viewer shows it, or F where the file names no grey levels.

    view: WINDOW-FRAME, or "". Raises ValueError, UserError with a reason that tells nothing else.
    """
    window, _, frame = (view or DEFAULT).partition("-")
    package = pydicom(file)
    data = package.dcmread(file, force=True)
    if not (data.get("Rows") and data.get("PixelData")):
        raise ValueError("DICOM without pixels, or no DICOM")
    check_size(int(data.Columns), int(data.Rows))
    n_frames = int(data.get("NumberOfFrames") or 1)
    if n_frames > 1:
        warn_once(f"DICOM with several frames: the {frame} one of each is read (--frame)")
    index = n_frames // 2 if frame == "middle" else 0
    if "TransferSyntaxUID" not in data.file_meta:  # an old file without a header: not compressed
        order = "Little" if data.original_encoding[1] else "Big"
        data.file_meta.TransferSyntaxUID = getattr(package.uid, f"ExplicitVR{order}Endian")
    take_frame_groups(data, index)
    if int(data.get("HighBit", data.BitsStored - 1)) != data.BitsStored - 1:  # pydicom masks others
        raise ValueError(f"its high bit is {data.HighBit}, of {data.BitsStored} bits stored")
    try:
        pixels = package.pixels.pixel_array(data, index=index)
    except RuntimeError as error:  # of every decoder, or that there is none
        name_of = data.file_meta.TransferSyntaxUID.name
        raise ValueError(f"damaged, or of a kind of {name_of} for which {CODECS}") from error
    if data.PhotometricInterpretation == "PALETTE COLOR":
        colours = package.pixels.apply_color_lut(pixels, data)
        return eight_bits(colours, 8 * colours.itemsize)
    if pixels.ndim == 3:
        return eight_bits(pixels, int(data.BitsStored))
    return grey(package, pixels, data, window)


def take_frame_groups(data: Any, index: int) -> None:
    """Rescale and window of one frame, where an enhanced file keeps them by frame."""
    shared = list(data.get("SharedFunctionalGroupsSequence") or ())
    own = list(data.get("PerFrameFunctionalGroupsSequence") or ())[index : index + 1]
    for group in (*shared[:1], *own):
        for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if values := group.get(macro):
                data.update(values[0])


def eight_bits(colours: np.ndarray, bits: int) -> PIL.Image.Image:
    """(H, W, 3) with so many bits -> RGB."""
    return PIL.Image.fromarray((colours >> max(bits - 8, 0)).astype(np.uint8))


def grey(package: ModuleType, pixels: np.ndarray, data: Any, window: str) -> PIL.Image.Image:
    """(H, W) as stored -> L in the file's window, or its modality's; F if there is neither.

    Source: DICOM PS3.3 C.11.1 (rescale), C.11.2 (window), C.7.6.3.1.2 (MONOCHROME1 is inverted).
    """
    has_window = data.get("WindowCenter") is not None and np.ravel(data.get("WindowWidth"))[0]
    has_any = has_window or data.get("VOILUTSequence")
    in_hu = (data.get("Modality") == "CT" and data.get("RescaleIntercept") is not None
             and data.get("RescaleSlope") is not None
             and (data.get("RescaleType") or "HU").startswith("HU"))  # fmt: skip
    values = package.pixels.apply_modality_lut(pixels, data)
    if in_hu and (window != "auto" or not has_any):
        data.WindowCenter, data.WindowWidth = WINDOWS["soft" if window == "auto" else window]
        data.VOILUTFunction, has_window = "LINEAR", True
    elif data.get("VOILUTSequence"):
        table = data.VOILUTSequence[0]
        n, first, bits = table.LUTDescriptor
        raw = table.LUTData
        word = "u1" if len(raw) == n else "<u2" if data.original_encoding[1] else ">u2"
        lut = np.frombuffer(raw, word) if isinstance(raw, bytes) else np.asarray(raw)
        at = np.clip(values.astype(np.int64) - first, 0, len(lut) - 1)
        return as_grey(lut[at] / max(2**bits - 1, lut.max()), data)  # some claim too few bits
    if has_window:
        ends = np.array([-1e9, 1e9])  # what they become is black and white

        def windowed(v: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):
                return package.pixels.apply_windowing(v, data)

        low, high = windowed(ends)
        return as_grey((windowed(values) - low) / (high - low), data)
    sign = -1 if data.PhotometricInterpretation == "MONOCHROME1" else 1
    values = sign * values.astype(np.float32)
    ends = [data.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is not None:  # padding is no part of the image
        ends = [end for end in ends if end is not None]
        values[(pixels >= min(ends)) & (pixels <= max(ends))] = np.nan
    return PIL.Image.fromarray(values)


def as_grey(unit: np.ndarray, data: Any) -> PIL.Image.Image:
    """(H, W) in 0 .. 1 -> L."""
    unit = 1 - unit if data.PhotometricInterpretation == "MONOCHROME1" else unit
    return PIL.Image.fromarray((unit * 255).round().astype(np.uint8))
