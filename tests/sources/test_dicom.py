"""DICOM files are shown as a viewer shows them, and tell nothing of the patient."""

import numpy as np
import pytest

from config import UserError
from sources.images import open_image
from sources.load import load_samples

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
WINDOW = {"WindowCenter": 1100.5, "WindowWidth": 101}
RAW = {"Modality": "OT", "RescaleSlope": None, "RescaleIntercept": None}
NEGATIVE, RAMP = {"PhotometricInterpretation": "MONOCHROME1"}, [[0, 1050], [1100, 1101]]
LUT = {"LUTDescriptor": [4, 1000, 8], "LUTData": bytes([0, 0, 5, 0, 200, 0, 255, 0])}
SECRETS = {"PatientName": "Doe^Jane", "PatientBirthDate": "19700101", "StudyDate": "2020notadate"}


def tag(data, tags):
    """A dictionary is the only item of a sequence; None removes a tag."""
    for name, value in tags.items():
        if value is None:
            del data[name]
        else:
            is_item = isinstance(value, dict)
            setattr(data, name, [tag(pydicom.Dataset(), value)] if is_item else value)
    return data


def write(file, pixels, **tags):
    """A CT, -1024 + 1 x in HU, without a window, of these pixels (H, W), or (frames, H, W)."""
    pixels = np.asarray(pixels, "<i2")
    size = dict(zip(("NumberOfFrames", "Rows", "Columns"), (1, *pixels.shape)[-3:], strict=True))
    data = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    data.file_meta.TransferSyntaxUID = tags.pop("syntax", data.file_meta.TransferSyntaxUID)
    tag(data, SECRETS | size | {"PixelData": pixels.tobytes()} | tags).save_as(file)
    return file


@pytest.mark.parametrize(("pixels", "tags", "view", "expected"), [
    (RAMP, {}, "", [0, 119, 151, 151]),  # soft tissue: 26 HU is (26 - 39.5) / 399 + 0.5
    ([[0, 424], [1174, 1175]], {}, "lung-first", [55, 128, 255, 255]),
    ([[1024, 1063], [1064, 1200]], WINDOW, "brain-first", [0, 126, 129, 255]),
    (RAMP, {"WindowCenter": [76.5, 0], "WindowWidth": [101, 1]}, "", [0, 0, 128, 130]),
    (RAMP, RAW | WINDOW, "", [0, 0, 128, 130]),
    (RAMP, RAW | WINDOW | NEGATIVE, "", [255, 255, 128, 125]),
    (RAMP, RAW | WINDOW | {"VOILUTFunction": "SIGMOID"}, "", [0, 30, 126, 129]),
    (RAMP, RAW | {"PerFrameFunctionalGroupsSequence": {"FrameVOILUTSequence": WINDOW}}, "",
     [0, 0, 128, 130]),
    ([[0, 2025], [2026, 2900]], {"VOILUTSequence": LUT}, "", [0, 5, 200, 255]),
    ([[-300, -200], [-100, 0]], RAW | NEGATIVE, "", [255, 171, 84, 0]),
    ([RAMP, RAMP[::-1]], RAW | WINDOW, "auto-middle", [128, 130, 0, 0])])  # fmt: skip
def test_grey_levels_are_those_of_the_standards_formulas(tmp_path, pixels, tags, view, expected):
    file = write(tmp_path / "scan", pixels, **tags)  # known by its content
    found = np.asarray(open_image(file / view))[..., 0].ravel()
    np.testing.assert_allclose(found.astype(int), expected, atol=1)


@pytest.mark.parametrize(("name", "view", "expected"), [
    ("CT_small.dcm", "", [(12, 12, 0), (37, 62, 237), (62, 112, 80), (87, 37, 138)]),
    ("CT_small.dcm", "lung-first", [(12, 12, 88), (37, 62, 255), (62, 112, 223), (87, 37, 239)]),
    ("MR_small_RLE.dcm", "", [(6, 6, 143), (18, 30, 75), (30, 54, 227), (42, 18, 81)]),
    ("examples_palette.dcm", "", [(35, 80, (37, 62, 94)), (105, 400, 135), (315, 560, 1)]),
    ("SC_ybr_full_422_uncompressed.dcm", "", [(10, 10, (255, 126, 133)), (70, 30, (64, 63, 64))]),
])  # fmt: skip
def test_real_files_look_as_in_a_viewer(name, view, expected):  # dcmtk's dcmj2pnm
    image = np.asarray(open_image(pydicom.data.get_testdata_file(name) + f"/{view}")).astype(int)
    for y, x, value in expected:
        np.testing.assert_allclose(image[y, x], value, atol=1)


@pytest.mark.parametrize(("tags", "message"), [
    ({"PixelData": None}, "DICOM without pixels"), ({"Rows": 30000, "Columns": 30000}, "claims"),
    ({"PixelData": b"12"}, "less than expected"), ({"SamplesPerPixel": None}, "Samples per Pixel"),
    ({"syntax": "1.2.840.10008.1.2.4.80"}, "JPEG-LS .* pip install pylibjpeg")])  # fmt: skip
def test_a_bad_file_is_refused_and_nothing_of_the_patient_printed(
    tmp_path, tags, message, capfd, recwarn, caplog
):
    coded = {"PixelData": pydicom.encaps.encapsulate([b"1234"])} if "syntax" in tags else {}
    file, printed = write(tmp_path / "a.dcm", RAMP, **coded, **tags), ""
    recwarn.clear()
    caplog.clear()
    for name, reason in ((file, message), (file / "bone", "must be WINDOW-FRAME")):
        with pytest.raises(UserError, match=rf"^image {name}: [^\n]*{reason}") as caught:
            open_image(name)
        printed += str(caught.value)
    printed += "".join([*capfd.readouterr(), caplog.text, *(str(w.message) for w in recwarn)])
    assert not any(value in printed for value in (*SECRETS.values(), "Doe", "Jane"))


def test_a_table_takes_the_window_and_the_modality_as_the_routers_label(tmp_path):
    write(tmp_path / "a.dcm", RAMP)
    (tmp_path / "t.csv").write_text("image,question,answer\na.dcm,What?,A lung\n")
    (sample,) = load_samples([f"table:{tmp_path / 't.csv'}"], "vqa", "test", window="lung")
    assert (sample.image, sample.modality) == (tmp_path / "a.dcm" / "lung-first", "CT")
