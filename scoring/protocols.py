"""The scorers of two published papers, reproduced quirk for quirk: their numbers, not better ones.

metrics.py has this project's own scores. A number from a paper can only be compared with a number
of the same scorer, and these two are generous in ways one has to know:

  quirk (M = Med-MoE, L = LLaVA-Med)                               answer / truth            M   L
  closed: the truth is searched for as letters, not as a word     abnormal / no             1   1
  closed: both yes and no is right, so is any long answer         yes and no / no           1   1
  closed: an answer without the letters yes or no is wrong (L)    left / left               1   0
  closed: the text is normalised first (L), so none becomes 0     none / no                 1   0
  closed: a truth of nothing is in every answer                   no / A                    0   1
  recall: each repetition of a right word counts as one more      left left left / upper left: 3/4
  "exact match" is a precision: right different words / words     the left lung / left:        1/2
  a mark becomes a space: t2-ct -> t2 ct; once one stands beside a space, all of its kind are
  deleted instead: t2-ct - mri -> t2ct mri; a comma between digits deletes all: 1,5 t2-ct -> 15 t2ct
  a period is deleted unless a digit follows, but at most 32      no. .5 -> no .5
  none, zero .. ten become digits; a, an, the go; dont = don't    zero the dont -> 0 don't
  : ' * % and the other marks stay in their words                 lung: is not lung
  BLEU-1 is taken from the raw words (M), the normalised ones (L) lung. / lung              0   1

Both papers report the plain mean over questions, times 100, printed to six digits. No question
stops either scorer: an open one with an empty text scores 0. Not scored here, but needed to
recompute a table: both pair answers with questions by their order (L checks the ids). M knows the
types open, OPEN, close, CLOSED, and L only OPEN and CLOSED; others are skipped without a word. Both
stop with an error where there is no open question, M also where there is no closed one. Before
8faf5ec, and @b9a98a7 still in run_eval_pvqa.py:89-93, L leaves a wrong closed answer that has yes
or no in it out of the mean. L's open accuracy needs a file that was never published.

Sources: jiangsongtao/Med-MoE run_eval.py and moellava/eval/eval_metrics/ @148cbd6,
microsoft/LLaVA-Med llava/eval/run_eval.py and llava/eval/eval_metrics/ @b9a98a7; the two
eval_metrics/ are the same, byte for byte. Read, not copied. BLEU is nltk's sentence_bleu.
"""

import re
from collections import Counter

from metrics import Protocol, unigram_bleu

MARKS = ';/[]"{}()=+\\_-><@`,?!'  # glossary.py:143-165; no : ' . * % in it
PERIODS_DELETED = 32  # glossary.py:177: the flag re.UNICODE stands where re.sub takes a count
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've
"""


def contractions() -> dict[str, str]:
    """Every spelling that lacks one apostrophe -> the word: dont -> don't, itd've -> it'd've.

    Three entries break the rule: two change nothing, one takes the apostrophe away.
    Source: the table of glossary.py:3-124 @148cbd6; the rule is ours.
    """
    table = {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
    for word in CONTRACTED.split():
        places = [i for i, letter in enumerate(word) if letter == "'"]
        table |= {word[:i] + word[i + 1 :]: word for i in places}
    return table


CONTRACTIONS = contractions()


def normalise(text: str) -> str:
    """'A T2-weighted scan, no. 2' -> 't2 weighted scan no 2'.

    Source: normalize_word, eval_metrics/glossary.py:168-190 @148cbd6 and @b9a98a7.
    """
    text = text.lower()
    glued = re.search(r"\d,\d", text) is not None
    marks = {ord(m): "" if glued or f"{m} " in text or f" {m}" in text else " " for m in MARKS}
    text = re.sub(r"\.(?!\d)", "", text.translate(marks), count=PERIODS_DELETED)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def overlap(answer: str, truth: str) -> dict[str, float]:
    """Recall, precision, F1 and "exact match" of the words, all 0 where no word is shared.

    Source: eval_metrics/evaluate_metrics.py:39-57, :114-148 and utils.py:30-41 @148cbd6.
    """
    found, wanted = Counter(normalise(answer).split()), Counter(normalise(truth).split())
    right = sum(n for word, n in found.items() if word in wanted)
    missed = sum(n for word, n in wanted.items() if word not in found)
    if right == 0:
        return dict.fromkeys(("recall", "precision", "f1", "exact_match"), 0.0)
    recall, precision = right / (right + missed), right / found.total()
    return {
        "recall": recall,
        "precision": precision,
        "f1": 2 * precision * recall / (precision + recall),
        "exact_match": len(found.keys() & wanted.keys()) / found.total(),
    }


def bleu1(answer: str, truth: str) -> float:
    """BLEU of single words (Papineni 2002): shared words / the answer's, less for a short answer.

    Med-MoE's smoothing never acts: nltk returns 0 before it where no word is shared.
    Source: Med-MoE run_eval.py:45-50 @148cbd6, LLaVA-Med run_eval.py:75-76 @b9a98a7;
    nltk 3.8.1 and 3.10.4 agree.
    """
    return unigram_bleu(answer.split(), truth.split()) if answer.split() else 0.0


def med_moe_closed(answer: str, truth: str) -> float:
    """1.0 if the truth's letters are anywhere in the answer, both lower-cased and nothing else.

    Source: Med-MoE run_eval.py:35-36, :58-61 @148cbd6.
    """
    return float(truth.lower() in answer.lower())


def med_moe_opened(answer: str, truth: str) -> dict[str, float]:
    """The word overlap, and BLEU-1 of the raw texts. Source: Med-MoE run_eval.py:35-50 @148cbd6."""
    return overlap(answer, truth) | {"bleu1": bleu1(answer.lower(), truth.lower())}


def llava_med_closed(answer: str, truth: str) -> float:
    """1.0 if the answer has the letters yes or no and the truth's letters, both normalised.

    So 'left' for 'left' is wrong and 'left, no doubt' is right (issue 113).
    Source: LLaVA-Med llava/eval/run_eval.py:41-45, :91-97 @b9a98a7.
    """
    answer, truth = normalise(answer), normalise(truth)
    return float(("yes" in answer or "no" in answer) and truth in answer)


def llava_med_opened(answer: str, truth: str) -> dict[str, float]:
    """The word overlap and BLEU-1, both of the normalised texts.

    The overlap normalises once more, which shows only where 33 or more periods were to go.
    Source: LLaVA-Med llava/eval/run_eval.py:41-45, :60-76 @b9a98a7.
    """
    answer, truth = normalise(answer), normalise(truth)
    return overlap(answer, truth) | {"bleu1": bleu1(answer, truth)}


MED_MOE = Protocol(med_moe_closed, med_moe_opened)
LLAVA_MED = Protocol(llava_med_closed, llava_med_opened)
