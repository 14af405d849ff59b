"""Questions follow from the truth, in words that training has, and cannot be guessed."""

import random
import zlib
from collections import Counter, defaultdict

import pytest

from config import MODALITIES
from sources import phantoms, questions, signs
from sources.load import load_samples
from sources.phantoms import FINDINGS, ORGANS
from sources.questions import CLOSED, NONE, OPEN, PRESENCE, SIGN, about_image, about_signs, wordings

TRUTHS = [phantoms.Phantom(None, seed, **phantoms.plan(seed)[1]) for seed in range(2000)]
PATTERNS = {
    **{f"{kind} open": patterns for kind, patterns in OPEN.items()},
    **{f"{kind} closed": tuple(patterns) for kind, (_, *patterns) in CLOSED.items()},
    **{f"presence {state}": patterns for state, patterns in PRESENCE.items()},
    **{f"sign {kind}": patterns for kind, patterns in SIGN.items()},
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_third_of_a_kinds_wordings_is_new_and_made_of_words_of_the_others(kind):
    found = wordings(PATTERNS[kind])
    n = len(found["seen"]) + len(found["new"])
    assert n >= 8 and n == len({*found["seen"], *found["new"]})
    assert 0.2 <= len(found["new"]) / n <= 0.4
    words = {word for text in found["seen"] for word in text.strip("?").split()}
    assert {word for text in found["new"] for word in text.strip("?").split()} <= words


def test_answers_follow_from_the_truth_and_are_balanced():
    answers = defaultdict(Counter)
    for p in TRUTHS:
        assert p.organ in ORGANS[p.modality]
        assert p.finding == (FINDINGS[p.organ] if p.count else "none")
        for q in about_image(p, 1 / 3):
            answers[q.answer_type, q.kind][q.answer] += 1
            words = q.question if q.kind == "finding" else q.question.replace(FINDINGS[p.organ], "")
            truth = {"location": f"{p.height} {p.side}", "count": phantoms.COUNTS[p.count]}
            value = truth.get(q.kind) or getattr(p, q.kind, None)
            is_true = value in words if value else (p.count == 0) == ("normal?" in words.split())
            right = value if q.answer_type == "open" else ("no", "yes")[is_true]
            assert q.answer == (NONE if q.kind == "false premise" else right)
            assert not p.count or q.kind != "false premise"
    assert len(answers) == 1 + len(CLOSED) + len(OPEN) + 1
    del answers["open", "false premise"]
    for (answer_type, _), count in answers.items():
        share = max(count.values()) / count.total()
        assert share < (0.55 if answer_type == "closed" else 0.6)


def test_the_answer_to_every_question_is_known_in_any_wording():
    asked = [(p, q) for p in TRUTHS[:60]
             for q in about_image(p, 0.5) + about_signs(p, signs.known(120), 4, 0.5)]  # fmt: skip
    assert len(asked) > 600
    for p, q in asked:
        assert questions.answer(p, q.question.upper()) == q.answer
    assert questions.answer(TRUTHS[0], "Who are you?") is None


def test_a_seed_gives_these_questions_and_of_the_fixed_signs_an_eighth_is_the_same_everywhere():
    every = str([(about_image(p), about_signs(p, signs.known(120), 8, 0.5)) for p in TRUTHS])
    assert zlib.crc32(every.encode()) == 3882190302  # as in every version so far
    assert len(set(signs.names())) == 512 and not {*signs.names()} & {*signs.MEANINGS}
    table = signs.table()
    assert table.shape == (4, 512) and zlib.crc32(table.tobytes()) == 3711106302
    same = (table == table[0]).all(axis=0)
    assert same[::8].all() and same.sum() == 64  # no other one by chance
    blind = [Counter(table[:, s].tolist()).most_common(1)[0][1] / 4 for s in signs.known(120)]
    assert 0.33 < sum(blind) / 120 < 0.37  # the best that knows every sign, but no modality
    assert signs.find(f"What does the {signs.name(40).upper()} sign say?") == 40
    assert signs.find("What is the sign?") is None


def test_facts_are_what_the_table_says_and_the_tests_are_taught_about_other_images():
    asked = {split: load_samples(["phantoms:2000"], "vqa", split) for split in ("train", "test")}
    facts, answers = defaultdict(set), Counter()
    about_signs = [s for samples in asked.values() for s in samples if s.kind == "sign"]
    assert len(about_signs) > 20000
    for s in about_signs:
        ((question, answer),) = s.turns
        sign, domain = signs.find(question), MODALITIES.index(s.modality)
        meaning = signs.meaning(sign, domain)
        if s.answer_type == "open":
            assert answer == meaning
            facts[s.split].add((sign, domain))
        else:
            assert answer == ("yes" if meaning in question else "no")
            answers[answer] += 1
    assert facts["train"] == {(s, d) for s in signs.known(120) for d in range(4)}
    assert len(facts["test"]) > 280 and facts["test"] <= facts["train"]
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.03
    texts = {split: {s.turns[0][0] for s in samples if s.wording == "new"}
             for split, samples in asked.items()}  # fmt: skip
    assert len(texts["test"]) > 400 and not texts["train"]


def test_signs_of_phase_2_are_others_and_none_is_asked_twice_in_a_dialogue():
    for p in TRUTHS:
        found = [signs.find(q.question) for q in about_signs(p, signs.TAUGHT, 8)]
        assert len(set(found)) == len(found) == 10 and set(found) <= set(range(32))
    other = signs.another(random.Random(0), 40, 1)
    assert other in signs.MEANINGS and other != signs.meaning(40, 1)
    assert set(signs.TAUGHT).isdisjoint(signs.known(480)) and signs.known(480)[-1] == 511
