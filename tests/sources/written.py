"""Small data sets in their owners' forms, written to a folder; most functions give their --data."""

import json

import numpy as np
import pytest
from PIL import Image

from config import UserError
from sources.load import load_samples

SLAKE = {
    "img_name": "xmlab0/source.jpg", "question": "Is this a CT?", "answer": "Yes", "q_lang": "en",
    "location": "Brain_Tissue", "modality": "X-Ray", "answer_type": "CLOSED ",
    "content_type": "Modality", "qid": 11}  # fmt: skip
RAD = {
    "image_name": "source.jpg", "phrase_type": "freeform", "question_type": "PRES, POS",
    "question": " How many? ", "answer": 4, "answer_type": "OPEN", "image_organ": "ABD", "qid": "0",
    "question_frame": "NULL"}  # fmt: skip


def load(spec, what="vqa", split="train", **how):
    return load_samples([spec] if isinstance(spec, str) else spec, what, split, **how)


def refused(match, read, *args, **how):
    """Reading ends in one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        read(*args, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_image(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def slake(folder, *rows, file="train.json"):
    save_image(folder / "imgs" / "xmlab0" / "source.jpg")
    (folder / file).write_text(json.dumps(rows))
    return f"slake:{folder}"


def rad(folder, *rows, images="images", kind="vqa-rad", file="VQA_RAD Dataset Public.json"):
    save_image(folder / images / "source.jpg")
    (folder / file).write_text(json.dumps(rows))
    return f"{kind}:{folder}"


def llava_item(name="1", question="<image>\nWhat is it?", answer="A lung.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": "x.jpg", "conversations": turns} | more


def llava(folder, *items, file="test.json"):
    save_image(folder / "images" / "x.jpg")
    (folder / file).write_text(json.dumps(items))
    return f"llava:{folder / file}"


def npz(folder, name, labels):
    labels = np.asarray(labels, np.uint8).reshape(len(labels), -1)
    parts = {"images": np.zeros((len(labels), 28, 28), np.uint8), "labels": labels}
    splits = ("train", "val", "test")
    np.savez(folder / f"{name}.npz", **{f"{s}_{k}": v for s in splits for k, v in parts.items()})
    return f"medmnist:{folder / name}.npz"
