"""DICOM files are shown as a viewer shows them, and tell nothing of the patient."""

import numpy as np
import pytest

from sources.images import open_image
from tests.sources.written import load, refused

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
SECRETS = {"PatientName": "Doe^Jane", "PatientBirthDate": "19700101", "StudyDate": "20200229"}


def tagged(data, **tags):
    for name, value in tags.items():
        setattr(data, name, [tagged(pydicom.Dataset(), **value)] if type(value) is dict else value)
    return data


def write(file, pixels, syntax=pydicom.uid.ExplicitVRLittleEndian, **tags):
    """A CT, -1024 + 1 x in HU, without a window, of these pixels (H, W), or (frames, H, W)."""
    pixels = np.asarray(pixels, "<i2")
    size = dict(zip(("NumberOfFrames", "Rows", "Columns"), (1, *pixels.shape)[-3:], strict=True))
    data = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    data.file_meta.TransferSyntaxUID = syntax
    tagged(data, **SECRETS | size | {"PixelData": pixels.tobytes()} | tags).save_as(file)
    return file


RAMP, WINDOW = [[0, 1050], [1100, 1101]], {"WindowCenter": 1100.5, "WindowWidth": 101}
RAW = {"Modality": "OT", "RescaleIntercept": 0}
NEGATIVE, FRAMES = {"PhotometricInterpretation": "MONOCHROME1"}, "PerFrameFunctionalGroupsSequence"
LUT = {"LUTDescriptor": [4, 1000, 8], "LUTData": bytes([0, 0, 5, 0, 200, 0, 255, 0])}
TOO_FEW_BITS = LUT | {"LUTData": np.array([0, 200, 400, 600], "<u2").tobytes()}


@pytest.mark.parametrize(("pixels", "tags", "view", "expected"), [
    (RAMP, {}, "", [0, 119, 151, 151]),  # soft tissue: 26 HU is (26 - 39.5) / 399 + 0.5
    ([[0, 424], [1174, 1175]], {}, "lung-first", [55, 128, 255, 255]),
    ([[1024, 1063], [1064, 1200]], WINDOW, "brain-first", [0, 126, 129, 255]),
    (RAMP, {"WindowCenter": [76.5, 0], "WindowWidth": [101, 1]}, "", [0, 0, 128, 130]),
    (RAMP, RAW | WINDOW, "", [0, 0, 128, 130]),
    (RAMP, RAW | {FRAMES: {"FrameVOILUTSequence": WINDOW}}, "", [0, 0, 128, 130]),
    (RAMP, RAW | NEGATIVE | WINDOW, "", [255, 255, 128, 125]),
    (RAMP, RAW | WINDOW | {"VOILUTFunction": "SIGMOID"}, "", [0, 30, 126, 129]),
    ([[0, 2025], [2026, 2900]], {"VOILUTSequence": LUT}, "", [0, 5, 200, 255]),
    ([[0, 2025], [2026, 2900]], {"VOILUTSequence": TOO_FEW_BITS}, "", [0, 85, 170, 255]),
    ([[-300, -200], [-100, 0]], RAW | NEGATIVE, "", [255, 171, 84, 0]),
    ([[0, 750], [1500, 32767]], RAW | {"PixelPaddingValue": 32767}, "", [0, 128, 255, 0]),
    (RAMP, {"RescaleType": "US"}, "", [0, 243, 255, 255]),  # no HU, so no window of a CT
    ([RAMP, RAMP[::-1]], RAW | WINDOW, "auto-middle", [128, 130, 0, 0])])  # fmt: skip
def test_grey_levels_are_those_of_the_standards_formulas(tmp_path, pixels, tags, view, expected):
    file = write(tmp_path / "scan", pixels, **tags)  # known by its content
    found = np.asarray(open_image(file / view))[..., 0].ravel()
    np.testing.assert_allclose(found.astype(int), expected, atol=1)


def test_real_files_look_as_in_a_viewer(tmp_path):
    for name, y, x, value in (
        ("CT_small", 37, 62, 237), ("MR_small_RLE", 18, 30, 75), ("examples_palette", 35, 80,
        (37, 62, 94)), ("SC_ybr_full_422_uncompressed", 10, 10, (255, 126, 133)),
    ):  # fmt: skip
        image = open_image(pydicom.data.get_testdata_file(f"{name}.dcm"))
        np.testing.assert_allclose(image.getpixel((x, y)), value, atol=1)  # dcmtk's dcmj2pnm
    old = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    old.preamble, old.file_meta = None, pydicom.dataset.FileMetaDataset()
    old.save_as(tmp_path / "old.dcm", implicit_vr=True, little_endian=True)  # without a header
    assert open_image(tmp_path / "old.dcm").getpixel((62, 37)) == (238, 238, 238)


@pytest.mark.parametrize(("tags", "message"), [
    ({"PixelData": None}, "DICOM without pixels"), ({"Rows": 30000, "Columns": 30000}, "claims"),
    ({"PixelData": b"12"}, "less than expected"), ({"HighBit": 14}, "high bit is 14, of 16 bits"),
    ({"syntax": "1.2.840.10008.1.2.4.80", "PixelData": pydicom.encaps.encapsulate([b"1234"])},
     "JPEG-LS .* pip install pylibjpeg")])  # fmt: skip
def test_a_bad_file_is_refused_and_nothing_of_the_patient_told(
    tmp_path, tags, message, capfd, recwarn, caplog
):
    file = write(tmp_path / "a.dcm", RAMP, **tags)
    printed = refused(f"^image {file}: .*{message}", open_image, file)
    printed += "".join([*capfd.readouterr(), caplog.text, *(str(w.message) for w in recwarn)])
    assert not any(value in printed for value in (*SECRETS.values(), "Doe", "Jane"))


def test_a_table_takes_the_window_and_the_modality_as_the_routers_label(tmp_path):
    write(tmp_path / "a.dcm", RAMP)
    (tmp_path / "t.csv").write_text("image,question,answer\na.dcm,What?,A lung\n")
    (sample,) = load(f"table:{tmp_path / 't.csv'}", "vqa", "test", window="lung")
    assert (sample.image, sample.modality) == (tmp_path / "a.dcm" / "lung-first", "CT")
