"""MedMNIST 2D (Yang et al. 2023): its twelve sets as published, scored by its own definitions.

A set is one .npz file: a zip of NumPy arrays, {train,val,test}_images and _labels. The sizes in the
zip's directory are checked before anything is unpacked, and pickles are never read.

    N images    S side: 28, 64, 128 or 224    C classes    L labels that are scored by themselves

Source: MedMNIST/MedMNIST medmnist/info.py (classes, tasks, counts), evaluator.py (scores) @805b742.
"""

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from config import UserError

Task = Literal["multi-class", "binary-class", "multi-label", "ordinal"]

MAX_SIDE = 1024  # the largest published is 224
MAX_BYTES = 20_000_000_000  # of one array; the largest published, pathmnist_224, has 13.5e9
MAX_RATIO = 200  # bytes out of one byte of zip; zeros give 1000
FREE_BYTES = 10_000_000  # up to here any ratio will do


@dataclass(frozen=True)
class MedMNIST:
    """One set: label i means classes[i]; in a multi-label set, column i."""

    name: str
    task: Task
    classes: tuple[str, ...]
    modality: str | None  # one of config.MODALITIES; None: none of them fits
    counts: tuple[int, int, int]  # published images in train, val, test


# The owners' words in lower case, with sides before organs ("femur-left") and "or" for a comma;
# shortened: immature granulocytes. Lengthened: "pleural" (thickening), and the grades "0" to "4".
# fmt: off
ORGANS = ("bladder, left femur, right femur, heart, left kidney, right kidney, liver, left lung, "
          "right lung, pancreas, spleen")
SETS = {name: MedMNIST(name, task, tuple(classes.split(", ")), modality, counts)
        for name, task, modality, counts, classes in (
    ("pathmnist", "multi-class", "pathology", (89996, 10004, 7180),
     "adipose, background, debris, lymphocytes, mucus, smooth muscle, normal colon mucosa, "
     "cancer-associated stroma, colorectal adenocarcinoma epithelium"),
    ("chestmnist", "multi-label", "X-ray", (78468, 11219, 22433),
     "atelectasis, cardiomegaly, effusion, infiltration, mass, nodule, pneumonia, pneumothorax, "
     "consolidation, edema, emphysema, fibrosis, pleural thickening, hernia"),
    ("dermamnist", "multi-class", None, (7007, 1003, 2005),
     "actinic keratoses and intraepithelial carcinoma, basal cell carcinoma, benign keratosis-like "
     "lesions, dermatofibroma, melanoma, melanocytic nevi, vascular lesions"),
    ("octmnist", "multi-class", None, (97477, 10832, 1000),
     "choroidal neovascularization, diabetic macular edema, drusen, normal"),
    ("pneumoniamnist", "binary-class", "X-ray", (4708, 524, 624), "normal, pneumonia"),
    ("retinamnist", "ordinal", None, (1080, 120, 400), "grade 0, grade 1, grade 2, "
     "grade 3, grade 4"),
    ("breastmnist", "binary-class", None, (546, 78, 156), "malignant, normal or benign"),
    ("bloodmnist", "multi-class", None, (11959, 1712, 3421), "basophil, eosinophil, erythroblast, "
     "immature granulocytes, lymphocyte, monocyte, neutrophil, platelet"),
    ("tissuemnist", "multi-class", None, (165466, 23640, 47280), "collecting duct or connecting "
     "tubule, distal convoluted tubule, glomerular endothelial cells, interstitial endothelial "
     "cells, leukocytes, podocytes, proximal tubule segments, thick ascending limb"),
    ("organamnist", "multi-class", "CT", (34561, 6491, 17778), ORGANS),
    ("organcmnist", "multi-class", "CT", (12975, 2392, 8216), ORGANS),
    ("organsmnist", "multi-class", "CT", (13932, 2452, 8827), ORGANS),
)}
# fmt: on


def which(file: Path) -> MedMNIST:
    """pneumoniamnist_64.npz -> pneumoniamnist. Raises UserError for the 3D sets and the rest."""
    start, mnist, rest = file.name.partition("mnist")
    if start + mnist not in SETS or rest.startswith("3d"):
        raise UserError(f"{file}: its name must begin with one of {', '.join(SETS)}")
    return SETS[start + mnist]


def read_array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """One array, if what the zip's directory claims is allowed. Raises ValueError."""
    n_entries = archive.namelist().count(member)
    if n_entries != 1:  # readers differ on which of two they take
        raise ValueError("is in the file twice" if n_entries else "is missing")
    info = archive.getinfo(member)
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("is encrypted, or packed otherwise than by NumPy")  # perhaps unbounded
    if info.file_size > MAX_BYTES:
        raise ValueError(f"claims {info.file_size} bytes, must be at most {MAX_BYTES}")
    # The claimed compressed size may be false too, but cannot exceed the file's.
    packed = min(info.compress_size, Path(archive.filename).stat().st_size)
    if info.file_size > max(FREE_BYTES, MAX_RATIO * packed):
        raise ValueError(f"{info.file_size} bytes out of {packed}: no image compresses so well")
    with archive.open(info) as stream:  # ends after file_size bytes
        try:  # np.load would also open a zip within the zip
            array = np.lib.format.read_array(stream, allow_pickle=False)
        except (zipfile.BadZipFile, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"its npy header or data is damaged: {error}") from error
        if (size := stream.tell()) != info.file_size:
            raise ValueError(f"its npy header means {size} bytes, the zip claims {info.file_size}")
    return array


def check_images(images: np.ndarray) -> None:
    shape = images.shape
    is_square = len(shape) > 2 and shape[1] == shape[2] and shape[3:] in ((), (3,))
    if images.dtype != np.uint8 or not is_square or not shape[0] or not 1 <= shape[1] <= MAX_SIDE:
        wanted = f"uint8 (N, S, S) or (N, S, S, 3), N from 1, S from 1 to {MAX_SIDE}"
        raise ValueError(f"is {images.dtype} {shape}, must be {wanted}")


def check_labels(labels: np.ndarray, known: MedMNIST, n: int) -> None:
    n_classes = len(known.classes)
    columns, highest = (n_classes, 1) if known.task == "multi-label" else (1, n_classes - 1)
    if labels.dtype.kind not in "iu" or labels.shape != (n, columns):
        wanted = f"integers {(n, columns)} for {n} images"
        raise ValueError(f"is {labels.dtype} {labels.shape}, must be {wanted}")
    if len(at := np.argwhere((labels < 0) | (labels > highest))):
        raise ValueError(f"row {at[0, 0]} (from 0) is {labels[*at[0]]}, must be 0 to {highest}")


@functools.lru_cache(maxsize=4)
def read_split(file: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S) or (N, S, S, 3) uint8 and labels (N,) or (N, L) int64, both read-only.

    The last four are kept; a file that changes meanwhile is not read again. Raises UserError.
    """
    known = which(file)
    where = f"{file}"
    try:
        if not file.is_file():  # zipfile would wait for a pipe
            raise ValueError("is a directory" if file.is_dir() else "no such file")
        with zipfile.ZipFile(file) as archive:
            where = f"{file}: {split}_images.npy"
            images = read_array(archive, f"{split}_images.npy")
            check_images(images)
            where = f"{file}: {split}_labels.npy"
            labels = read_array(archive, f"{split}_labels.npy")
            check_labels(labels, known, len(images))
    except Exception as error:  # zipfile, zlib, ast and NumPy raise a dozen kinds, MemoryError too
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise UserError(f"{where}: {reason.splitlines()[0][:200]}") from error
    labels = (labels if known.task == "multi-label" else labels[:, 0]).astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def per_label(truth: np.ndarray, scores: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(N, L) bool and (N, L) scores, to be scored column by column; a binary task has L = 1.

    truth (N,), or (N, L) multi-label; scores (N, C) or (N, L).
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"{task}: a score is not finite")
    hits = truth == 1 if task == "multi-label" else truth[:, None] == np.arange(scores.shape[1])
    return (hits[:, 1:], scores[:, 1:]) if task == "binary-class" else (hits, scores)


def accuracy(truth: np.ndarray, scores: np.ndarray, task: Task) -> float:
    """Share that is right, as in MedMNIST evaluator.py getACC @805b742.

    multi-class, ordinal       the class of the highest score, the first of equals
    binary-class, multi-label  each label (column 1; all columns) where its score is above 0.5
    """
    hits, scores = per_label(truth, scores, task)
    if task in ("multi-label", "binary-class"):
        return float(((scores > 0.5) == hits).mean())
    return float((scores.argmax(1) == truth).mean())


def auc(truth: np.ndarray, scores: np.ndarray, task: Task) -> float | None:
    """Area under the ROC curve, as in MedMNIST evaluator.py getAUC @805b742.

    The chance that an image with the label scores above one without it, ties counting one half;
    the mean over the classes (one against the rest), over the labels, or in a binary task class 1.
    None if undefined: a label that no image has, or every one.
    """
    hits, scores = per_label(truth, scores, task)
    areas = []
    for hit, score in zip(hits.T, scores.T, strict=True):
        n_with, n_without = int(hit.sum()), int((~hit).sum())
        if not n_with or not n_without:
            return None
        _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # (N,) from 1; ties share their mean
        areas.append((ranks[hit].sum() - n_with * (n_with + 1) / 2) / (n_with * n_without))
    return float(np.mean(areas))
