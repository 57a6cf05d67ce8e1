"""The 33 questions of MUSIC-AVQA: the comparison that each asks for, and the statement that its answer makes.

The wording of the templates is that of the release, without its full-width question mark and trailing spaces
(GeWu-Lab/MUSIC-AVQA, data/json). A question has one sentence for how to find the answer and one for the finding;
questions answered by yes or no have two of the latter.
"""

from __future__ import annotations

import re
from typing import NamedTuple

INSTRUMENTS = (
    "accordion",
    "acoustic_guitar",
    "bagpipe",
    "banjo",
    "bassoon",
    "cello",
    "clarinet",
    "congas",
    "drum",
    "electric_bass",
    "erhu",
    "flute",
    "guzheng",
    "piano",
    "pipa",
    "saxophone",
    "suona",
    "trumpet",
    "tuba",
    "ukulele",
    "violin",
    "xylophone",
)
_SLOTS = {
    "Object": "|".join(INSTRUMENTS),
    "LR": "left|right|middle",
    "LRer": "leftest|rightest",
    "LL": "loudest|lowest",
    "FL": "first|last",
    "TH": "first|second|third|fourth|fifth",
    "BA": "before|after",
}
SENSES = {
    "Audio": "The question is about the sound.",
    "Visual": "The question is about the picture.",
    "Audio-Visual": "The question is about the picture and the sound together.",
}


class Question(NamedTuple):
    """A template with slots, how to answer it, and the resulting statement; `{0}`, `{1}` are the slots' values."""

    template: str
    look: str
    found: str | tuple[str, str]  # a statement with {answer}, or the statements for yes and for no


def _yes_no(template: str, look: str, yes: str, no: str) -> Question:
    return Question(template, look, (yes, no))


QUESTIONS = (
    # Audio: Counting, Comparative
    Question(
        "How many musical instruments were heard throughout the video?",
        "I listen to the whole clip and count the instruments.",
        "The number of instruments heard is {answer}.",
    ),
    _yes_no("Is there a <Object> sound?", "I listen for the {0}.", "The {0} is heard.", "The {0} is never heard."),
    _yes_no(
        "Are there <Object> and <Object> sound?",
        "I listen for the {0} and for the {1}.",
        "The {0} and the {1} are both heard.",
        "The {0} and the {1} are not both heard.",
    ),
    _yes_no(
        "Is the <Object> louder than the <Object>?",
        "I listen to how loud the {0} and the {1} are.",
        "The {0} is louder than the {1}.",
        "The {0} is not louder than the {1}.",
    ),
    _yes_no(
        "Is the <Object> more rhythmic than the <Object>?",
        "I listen to the rhythm of the {0} and of the {1}.",
        "The {0} is more rhythmic than the {1}.",
        "The {0} is not more rhythmic than the {1}.",
    ),
    _yes_no(
        "Is the <Object> playing longer than the <Object>?",
        "I listen to how long the {0} and the {1} play.",
        "The {0} plays longer than the {1}.",
        "The {0} does not play longer than the {1}.",
    ),
    # Visual: Counting, Location
    Question(
        "How many types of musical instruments appeared in the entire video?",
        "I look at the whole video and count the kinds of instruments.",
        "The number of kinds of instruments seen is {answer}.",
    ),
    Question(
        "How many <Object> are in the entire video?",
        "I look for every {0} in the whole video and count.",
        "The number of {0} seen is {answer}.",
    ),
    _yes_no(
        "Are there <Object> and <Object> instruments in the video?",
        "I look for the {0} and for the {1}.",
        "The {0} and the {1} are both seen.",
        "The {0} and the {1} are not both seen.",
    ),
    _yes_no(
        "Is there a <Object> in the entire video?",
        "I look for the {0} in the whole video.",
        "The {0} is seen.",
        "The {0} is never seen.",
    ),
    Question(
        "What is the instrument on the <LR> of <Object>?",
        "I find the {1} in the picture and look to its {0}.",
        "The instrument there is the {answer}.",
    ),
    Question(
        "What kind of musical instrument is it?", "I look at the instrument in the picture.", "It is the {answer}."
    ),
    Question("Where is the performance?", "I look at what surrounds the performers.", "The performance is {answer}."),
    Question(
        "What kind of instrument is the <LRer> instrument?",
        "I look at the instruments from one side to the other and take the {0}.",
        "It is the {answer}.",
    ),
    # Audio-Visual: Existential, Counting
    _yes_no(
        "Is this sound from the instrument in the video?",
        "I compare the sound with the instrument that I see.",
        "The instrument in the picture makes the sound.",
        "The sound has another source than this instrument.",
    ),
    _yes_no(
        "Is there a voiceover?",
        "I look for the source of everything that I hear.",
        "Something is heard whose source is not in the picture.",
        "Everything that is heard has its source in the picture.",
    ),
    _yes_no(
        "Is the <Object> in the video always playing?",
        "I watch and hear the {0} from beginning to end.",
        "The {0} plays all the time.",
        "The {0} does not play all the time.",
    ),
    Question(
        "How many sounding <Object> in the video?",
        "I look for every {0} and listen which of them sounds.",
        "The number of {0} that sound is {answer}.",
    ),
    Question(
        "How many instruments in the video did not sound from beginning to end?",
        "I look at every instrument and listen when it sounds, from beginning to end.",
        "The number of instruments that did not sound from beginning to end is {answer}.",
    ),
    Question(
        "How many instruments are sounding in the video?",
        "I look at every instrument and listen whether it sounds.",
        "The number of instruments that sound is {answer}.",
    ),
    Question(
        "How many types of musical instruments sound in the video?",
        "I look at every kind of instrument and listen whether it sounds.",
        "The number of kinds that sound is {answer}.",
    ),
    # Audio-Visual: Location
    _yes_no(
        "Is the <FL> sound coming from the <LR> instrument?",
        "I listen for the {0} sound and look which instrument makes it.",
        "The {0} sound comes from the {1} instrument.",
        "The {0} sound comes from elsewhere than the {1} one.",
    ),
    Question(
        "Where is the <LL> instrument?",
        "I listen for the {0} instrument and find it in the picture.",
        "The {0} instrument is at this place: {answer}.",
    ),
    Question(
        "Which is the musical instrument that sounds at the same time as the <Object>?",
        "I listen when the {0} sounds and what else sounds then.",
        "Together with the {0} sounds the {answer}.",
    ),
    Question(
        "What is the <LR> instrument of the <FL> sounding instrument?",
        "I listen which instrument sounds {1}, find it in the picture and look to its {0}.",
        "The instrument there is the {answer}.",
    ),
    # Audio-Visual: Comparative
    *(
        _yes_no(
            f"Is the {what} {more} than the {what}?",
            f"I find the two in the picture and compare {how}.",
            f"The {a} is {more} than the {b}.",
            f"The {a} is not {more} than the {b}.",
        )
        for more, how in (("louder", "how loud they are"), ("more rhythmic", "their rhythm"))
        for what, a, b in (
            ("<Object> on the <LR>", "{0} on the {1}", "{2} on the {3}"),
            ("instrument on the <LR>", "instrument on the {0}", "instrument on the {1}"),
        )
    ),
    # Audio-Visual: Temporal
    Question(
        "What is the <TH> instrument that comes in?",
        "I listen in which order the instruments start to sound.",
        "The {0} one to come in: {answer}.",
    ),
    Question(
        "Where is the <FL> sounding instrument?",
        "I listen which instrument sounds {0} and find it in the picture.",
        "It is at this place: {answer}.",
    ),
    Question(
        "Which <Object> makes the sound <FL>?",
        "I find every {0} in the picture and listen which one sounds {1}.",
        "It is this one: {answer}.",
    ),
    Question(
        "Which instrument makes sounds <BA> the <Object>?",
        "I listen when the {1} starts and what starts to sound {0} it.",
        "The answer to this is: {answer}.",
    ),
)


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"<(\w+)>", template)
    return re.compile(
        "".join(re.escape(piece) if i % 2 == 0 else f"({_SLOTS[piece]})" for i, piece in enumerate(pieces))
    )


_PATTERNS = [(_pattern(question.template), question) for question in QUESTIONS]


def spoken(name: str) -> str:
    """Return a label's name as words of a sentence: `acoustic_guitar` -> `acoustic guitar`."""
    return name.replace("_", " ").strip()


def match(text: str) -> tuple[Question, tuple[str, ...]] | None:
    """Return the template of a filled-in question and the values of its slots, or None for another question."""
    plain = " ".join(text.replace("？", "?").split())
    for pattern, question in _PATTERNS:
        if found := pattern.fullmatch(plain):
            return question, found.groups()
    return None


def reasoning(text: str, answer: str, kind: tuple[str, ...] = ()) -> str:
    """Return how a question is answered: the senses it needs, what to look or listen for, and what `answer` states.

    kind: the type in the release, (modality, kind). A question of another wording gets only the senses.
    """
    sentences = [SENSES[kind[0]]] if kind and kind[0] in SENSES else []
    if found := match(text):
        question, values = found
        statement = question.found
        if not isinstance(statement, str):
            yes, no = statement
            statement = {"yes": yes, "no": no}.get(answer.lower(), "What I find is: {answer}.")
        words = [spoken(value) for value in values]
        sentences += [question.look.format(*words), statement.format(*words, answer=spoken(answer))]
    return " ".join(sentences)
