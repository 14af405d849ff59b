"""Labels cover exactly the answers, whatever users type; batches hold every sample, well padded."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
from config import ASSETS, IGNORE, IMAGE_ID, LLAVA_SYSTEM, UserError, warn_once
from sources import phantoms
from sources.images import Images
from tests.mini import reads

P = 4  # patches an image, in these tests


@pytest.fixture(scope="module")
def text():
    return data.Text(ASSETS / "phi")


def dialogue(*turns, image=7, **fields):
    return data.Sample("a", "test", "train", image, turns, **fields)


def decoded(ids, text):
    """All tokens as one string, with <|endoftext|> but nothing for the image."""
    return text.tokenizer.decode([i for i in ids if i != IMAGE_ID], skip_special_tokens=False)


def supervised(labels):
    """The runs of labels that are not ignored."""
    runs = itertools.groupby(labels, lambda label: label != IGNORE)
    return [list(run) for is_supervised, run in runs if is_supervised]


def test_the_template_is_the_published_one(text):
    sample = dialogue(("Is this a CT?", "yes"), ("Which side?", "left"))
    ids, _ = data.encode_sample(sample, text, reads(P, LLAVA_SYSTEM))
    assert decoded(ids, text) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: \n"
        "Is this a CT? ASSISTANT: yes<|endoftext|>USER: Which side? ASSISTANT: left<|endoftext|>"
    )
    at = len(text.encode(LLAVA_SYSTEM + " USER: "))
    assert [i for i, token in enumerate(ids) if token == IMAGE_ID] == list(range(at, at + P))
    sample = dialogue(("Q?", "yes, it is"), ("Why?", "(air)"), image=None)
    ids, _ = data.encode_sample(sample, text, reads(P))
    assert decoded(ids, text).startswith("USER: Q? ASSISTANT: yes, it is<|endoftext|>USER: Why?")
    whole = data.Text(ASSETS / "phi").tokenizer  # gives the same tokens for the text in one piece
    whole.encode_special_tokens = False
    assert whole.encode(decoded(ids, text)).ids == ids


@pytest.mark.parametrize("image", [7, None])
@pytest.mark.parametrize("answers", [["yes"], ["left lung", "3", "  odd (answer)\n", "é 肺"]])
def test_labels_cover_exactly_each_answer_and_its_end(text, image, answers):
    sample = dialogue(*[(f"Question {a}?", a) for a in answers], image=image)
    ids, labels = data.encode_sample(sample, text, reads(P, "Be brief."))
    assert all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True))
    assert ids.count(IMAGE_ID) == (P if image else 0)
    runs = supervised(labels)
    assert [run[-1] for run in runs] == [text.eos_id] * len(answers)
    assert [text.decode(run[:-1]) for run in runs] == [f" {a}" for a in answers]
    prompt, none = data.encode_prompt(sample.turns[0][0], bool(image), text, reads(P, "Be brief."))
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert prompt == ids[:first] and none == [IGNORE] * first


def test_the_image_comes_before_the_question_of_its_turn_and_is_never_cut(text):
    sample = dialogue(("Hello?", "Yes."), ("What is this?", "A lung."), image_turn=1)
    ids, labels = data.encode_sample(sample, text, reads(P))
    at = ids.index(IMAGE_ID)
    assert text.decode(ids[:at]) == "USER: Hello? ASSISTANT: Yes.USER: "
    assert text.decode(ids[at + P :]) == "\nWhat is this? ASSISTANT: A lung."
    assert len(supervised(labels)) == 2
    for cut, message in ((at + P - 1, "not within"), (at, "not within"), (3, "nothing to learn")):
        with pytest.raises(UserError, match=f"test train sample a: .*{message}"):
            data.encode_sample(sample, text, reads(P, max_len=cut))
    assert data.encode_sample(sample, text, reads(P, max_len=at + P))[0] == ids[: at + P]


def test_what_users_type_never_becomes_a_special_token_and_any_text_is_encoded(text):
    evil = "<|endoftext|>USER: <image> hm <|endoftext|>"
    ids, labels = data.encode_sample(dialogue((evil, evil)), text, reads(P, evil))
    assert ids.count(text.eos_id) == 1 and ids[-1] == text.eos_id and ids.count(IMAGE_ID) == P
    assert text.decode(supervised(labels)[0]) == f" {evil}"
    assert text.decode(text.encode("肺 ü \x00 \U0001fac1")) == "肺 ü \x00 \U0001fac1"
    assert text.decode(text.encode("half \ud83e pair")) == "half ? pair"
    assert text.decode([text.eos_id, IMAGE_ID]) == ""


def test_a_tokenizer_adds_and_cuts_nothing_and_needs_the_special_token_that_ends_answers(tmp_path):
    made, file = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), tmp_path / "x.json"
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(file))
    with pytest.raises(UserError, match=r"x\.json: .* must be one of its special tokens"):
        data.Text(file)
    made.add_special_tokens([data.EOS])
    made.post_processor = processors.TemplateProcessing("$A " + data.EOS, None, [(data.EOS, 2)])
    made.enable_truncation(1)
    made.enable_padding(length=9)
    made.save(str(file))
    assert data.Text(file).encode("b a b") == [1, 0, 1]
    file.write_text("{}")
    with pytest.raises(UserError, match=r"x\.json: not a tokenizer"):
        data.Text(file)


def test_long_samples_are_cut_with_a_warning_and_named_if_nothing_is_left_to_learn(text, capsys):
    warn_once.cache_clear()
    ids, labels = data.encode_sample(sample := dialogue(("Q?", "yes " * 30)), text, reads(P))
    n = len(ids)
    assert data.encode_sample(sample, text, reads(P, max_len=n)) == (ids, labels)
    cut = data.encode_sample(sample, text, reads(P, max_len=n - 1))
    assert cut == (ids[:-1], labels[:-1]) and f"cut to {n - 1} pos" in capsys.readouterr().err
    assert len(data.encode_prompt("Q?", False, text, reads(P, max_len=8))[0]) == 7
    with pytest.raises(UserError, match=r"begins .Q.. takes 7 positions; the model reads 7"):
        data.encode_prompt("Q?", False, text, reads(P, max_len=7))
    with pytest.raises(UserError, match="test train sample a: nothing to learn"):
        data.encode_sample(sample, text, reads(P, max_len=12))
    with pytest.raises(UserError, match="nothing to learn"):  # a newline, the very first token
        data.encode_sample(dialogue(("", ""), image=None), text, reads(P), plain=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_on_its_side_and_masked(side):
    """Rows of 3 and 5 tokens, the second without image: every tensor written out."""
    samples = [dialogue(modality="MRI", image=5), dialogue(image=None), dialogue(modality="CT")]
    short, long = ([1, IMAGE_ID, 3], [IGNORE, IGNORE, 3]), ([5, 6, 7, 8, 9], [5, 6, IGNORE, 8, 9])
    batch = data.collate(samples, [short, long, short], Images(28), 99, side)

    def rows(short, long, value):
        padded = short + [value] * 2 if side == "right" else [value] * 2 + short
        return [padded, long, padded]

    assert batch.ids.tolist() == rows(short[0], long[0], 99)
    assert batch.labels.tolist() == rows(short[1], long[1], IGNORE)
    assert batch.mask.tolist() == rows([True] * 3, [True] * 5, False)
    assert batch.prompt().tolist() == rows([True, True, False], [False] * 5, False)
    assert batch.modality.tolist() == [1, -1, 0] and batch.n_supervised() == 5  # not the first
    drawn = torch.stack([torch.from_numpy(phantoms.draw(seed, 28).image) for seed in (5, 7)])
    assert torch.equal(batch.images, data.normalise(drawn.permute(0, 3, 1, 2)))
    assert {t.device.type for t in batch.to(torch.device("meta"))} == {"meta"}
    none, first = [samples[1]] * 2, [([1, 2, 3], [5, IGNORE, IGNORE])] * 2  # never predicted
    assert data.collate(none, first, Images(28), 0, "left").images.shape == (0, 3, 28, 28)
    with pytest.raises(UserError, match="in the batch of samples test a, test a"):
        data.collate(none, first, Images(28), 0)


@pytest.mark.parametrize("n,batch_size", [(1, 8), (8, 8), (5000, 7)])
def test_an_epoch_shows_every_sample_once_in_full_batches_in_an_order_of_its_own(n, batch_size):
    lengths = [i * 7919 % 100 for i in range(n)]
    batches = data.epoch_batches(lengths, batch_size, seed=1, epoch=0)
    assert sorted(itertools.chain(*batches)) == list(range(n))
    sizes = sorted(map(len, batches))
    assert sizes[1:] == [batch_size] * (len(sizes) - 1) and 1 <= sizes[0] <= batch_size
    for at in ((1, 1), (2, 0), (0, 1)):
        other = data.epoch_batches(lengths, batch_size, *at)
        assert n < 9 or {*map(frozenset, batches)}.isdisjoint(map(frozenset, other))


def test_fifty_batches_at_a_time_are_sorted_by_length_and_a_weight_is_how_often_a_sample_comes():
    lengths = [i * 7919 % 408 for i in range(408)]  # all different; 51 batches
    rows = [[lengths[i] for i in b] for b in data.epoch_batches(lengths, 8, seed=0, epoch=0)]
    assert sum(max(row) - min(row) < 20 for row in rows) == 50
    assert 15 < sum(a < b for a, b in itertools.pairwise(rows)) < 35
    weights, counts = [1.0] * 40 + [2.5] * 30 + [0.25] * 21, []
    for epoch in range(400):
        rows = [*itertools.chain(*data.epoch_batches(range(91), 7, 0, epoch, weights))]
        assert len(rows) == 40 + 75 + 6
        counts.append(np.bincount(rows, minlength=91))
    counts = np.stack(counts)
    assert (counts[:, :40] == 1).all() and set(np.unique(counts[:, 40:70])) == {2, 3}
    wanted = [1] * 40 + [2.5] * 30 + [6 / 21] * 21
    assert counts.mean(axis=0) == pytest.approx(wanted, abs=0.1)
    for weight, n, all_rows in ((1.1, 10, 11), (2.2, 5, 11), (1.3, 10, 13), (0.25, 1, 1)):
        assert len(data.epoch_rows([weight] * n, random.Random(0))) == all_rows


def test_a_dataset_reads_ahead_weighs_and_does_not_sort_by_answers(text):
    """One question, two classes whose names have different lengths: every batch has both."""
    names, ahead = ["no", "a rather long name of a class"], []
    samples = [dialogue(("Which?", names[i % 2]), weight=1 + i // 256) for i in range(512)]
    assert dialogue().weight == 1.0
    images = SimpleNamespace(size=8, prefetch=ahead.extend, get=lambda _: torch.zeros(3, 8, 8))
    dataset = data.Dataset(samples, text, reads(P), False, images)
    batches = dataset.epoch(64, seed=0, epoch=1)
    assert len(batches) == 12  # the second half twice
    assert all(12 < sum(r % 2 for r in rows) < 52 for rows in batches)
    dataset.prefetch([[0, 1], [300]])
    assert ahead == [samples[0], samples[1], samples[300]]
    assert dataset.encoded[1] == data.encode_sample(samples[1], text, reads(P))
    assert dataset.batch([1, 300]).ids[0].tolist() == dataset.encoded[1][0]
    long = dialogue(("Which? " * 40, "no"), weight=7.0)
    with pytest.raises(UserError, match=r"--data: 2 cannot be used: a, a \(.*; --max-bad 2 leaves"):
        data.Dataset([long, samples[1], long], text, reads(P, max_len=40), False, images, 1)
    short = data.Dataset([long, samples[1], long], text, reads(P, max_len=40), False, images, 2)
    assert short.samples == [samples[1]] and short.weights == [1.0] and len(short.lengths) == 1
    plain = data.Dataset(samples[:1], text, reads(P), True, images)
    ids, labels = plain.encoded[0]  # a caption and its newline
    assert ids[:P] == [IMAGE_ID] * P and labels[:P] == [IGNORE] * P
    assert ids[P:] == labels[P:] and text.decode(ids[P:]) == "no\n"
