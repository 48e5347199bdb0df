r"""What a text claims about the options of a question: which it says, which it denies, and how firmly.

Used by judge.py. A text is first rewritten in a shorthand in which a claim is a matter of neighbouring words:

    Therefore the piece at position 2 isn't above (A)   ->   therefore piece:2 is not text:a letter:a

Then each clause is read on its own: from a named option back over linking words ("is", "must have been") to the
subject. Only what has a subject that the question is about is a claim. "Above the lawn there is a fence" is none.

Legend
claim       one option that a clause says or denies, by its letter ("so B") or by its text ("it was below")
firm        said as a conclusion: behind "so", "therefore", "the answer"
question    what must be known of a record: its options, and which piece it asks about, relative to which
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from rewards import LETTERS, letters_of, plain

# ---------------------------------------------------------------------------------------------------------------------
# Text without its dress: markdown, LaTeX displays, signs of other keyboards

SIGNS = str.maketrans({"−": "-", "：": ": ", "，": ", ", "。": ". ", "（": "(", "）": ")", "’": "'", "\u00a0": " "})
LINE_DRESS = re.compile(r"^[ \t]*(?:```[^\n]*$|(?:#{1,6}|>)[ \t]+)", re.MULTILINE)
ITALIC = re.compile(r"(?<![\w*])\*([^*\s][^*\n]{0,80})\*(?![\w*])")


def undress(text: str) -> str:
    """Without markdown; U+2212 becomes a minus, $$ and \\[ become $, the Chinese "the answer is" English."""
    text = text.translate(SIGNS)
    text = text.replace("答案是", "answer is ").replace("答案", "answer")
    text = LINE_DRESS.sub("", text)
    for mark in ("**", "__", "`"):
        text = text.replace(mark, "")
    for display in ("$$", "\\[", "\\]", "\\(", "\\)"):
        text = text.replace(display, "$")
    return ITALIC.sub(r"\1", text)


def sentences_of(text: str) -> list[str]:
    """Split behind . ! ? ; and at line ends, unless the line announces the next one with a colon."""
    text = re.sub(r":[ \t]*\n\s*", ": ", text)
    return [sentence for sentence in re.split(r"(?<=[.!?;])\s+|\n+", text) if sentence.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Options: the shorthand

MAX_PROMPT = 10_000  # characters of a prompt that are searched for the pieces it names

OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
PIECE = r"(?:piece|patch|tile|part|block|segment|position|place|slot|number)"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
VERTICAL = r"(?:above|below)"
HORIZONTAL = r"(?:left|right)"

# Other words for the directions of a puzzle's options. "over" is left out: it says too many other things.
SYNONYMS = [
    (r"on top of|atop|higher than|higher up than", "above"),
    (r"beneath|underneath|under|lower than|lower down than", "below"),
    # In a corner of what? Without "of" it is a place in the picture and no relation.
    (rf"(?:upper|top)[ -]({HORIZONTAL})(?: corner| side)?(?= of\b| relative\b| from\b|$)", r"above and \1"),
    (rf"(?:lower|bottom)[ -]({HORIZONTAL})(?: corner| side)?(?= of\b| relative\b| from\b|$)", r"below and \1"),
    (rf"({VERTICAL}),?(?: and| but)?,?(?: also)?(?: further)?(?: to| on)?(?: the)? ({HORIZONTAL})", r"\1 and \2"),
    (rf"({HORIZONTAL})(?: of)?,? and(?: also)? ({VERTICAL})", r"\2 and \1"),
]
# "right" may also mean that something is correct.
CORRECT = (
    r"(?<=\bthat is )right|(?<=\bthat's )right|(?<=\bsounds )right|(?<=\bseems )right|(?<=\bthis is )right"
    r"|(?<=\bletter:[a-z] is )right|right(?= (?:answer|choice|option|order|arrangement|letter)\b)"
)


def in_order(text: str) -> str:
    """Lower case, one space between words, and one word for each direction: "Beneath" -> "below"."""
    text = " ".join(text.casefold().split())
    for words, direction in SYNONYMS:
        text = re.sub(rf"\b(?:{words})\b", direction, text)
    return text


def opposite(direction: str) -> str:
    """ "above and left" -> "below and right"; a text that is no direction comes back unchanged."""
    return " ".join(OPPOSITE.get(word, word) for word in direction.split())


@dataclass
class Question:
    """What the shorthand needs to know of a record."""

    letter_of: dict[str, str] = field(default_factory=dict)  # option text, in order -> its letter
    pair: tuple[str, str] | None = None  # the question asks for the first piece relative to the second
    words: frozenset[str] = frozenset()  # of the prompt: what the question is about
    letters: str = LETTERS

    @property
    def about_directions(self) -> bool:
        return bool(self.letter_of) and all(opposite(text) != text for text in self.letter_of)

    def text_of(self, letter: str) -> str:
        return next((text for text, name in self.letter_of.items() if name == letter), "")


def question_of(record: dict) -> Question:
    letter_of = {}
    for letter, option in zip(LETTERS, record.get("options") or [], strict=False):
        if plain(option):
            letter_of[in_order(plain(option))] = letter
    prompt = str(record.get("prompt") or "")[:MAX_PROMPT]
    pair = record.get("pair")
    if not (isinstance(pair, list | tuple) and len(pair) == 2):
        named = re.search(r"position ([0-9]{1,2})\b[^?\n]{0,40}relative to[^?\n]{0,40}position ([0-9]{1,2})\b", prompt)
        pair = named.groups() if named else None
    words = frozenset(re.findall(r"[a-z]{3,}", prompt.casefold()))
    pair = tuple(str(place) for place in pair) if pair else None
    return Question(letter_of, pair, words, letters_of(record))


def shorthand(text: str, question: Question) -> str:
    """Pieces become "piece:2", letters "letter:b", texts of options "text:b"; the rest is lower case."""
    text = re.sub(r"\\boxed|\\text|[{}$\"“”]", " ", text)
    text = re.sub(r"\bcan(?:not|'t)\b", "can not", text)
    text = re.sub(r"n't\b", " not", text).replace("/", " or ")
    texts = sorted(question.letter_of, key=len, reverse=True)  # a longer option hides the shorter ones inside it

    # "B. below" is one mention, and its full stop ends no sentence.
    for option in texts:
        letter = question.letter_of[option]
        text = re.sub(rf"(?<!\w)\(?{letter}[.):] +(?i:{re.escape(option)})(?!\w)", f" letter:{letter.lower()} ", text)
    # "B) the car is green": a label of a list takes no side.
    text = re.sub(r"^[ \t]*(?:[-*•][ \t]+)?\(?[A-Z][.):][ \t]+(?=[A-Za-z])", " ", text, flags=re.MULTILINE)
    text = re.sub(r"\(([A-Z])\)|(?<![\w'])([A-Z])(?![\w'])", lambda match: mention(match, text, question), text)

    text = "\n".join(in_order(line) for line in text.split("\n"))
    text = re.sub(CORRECT, "correct", text)
    for number, ordinal in enumerate(ORDINALS, start=1):
        text = re.sub(rf"\b(?:the )?{ordinal} (?:one|{PIECE})\b", f"piece:{number}", text)
    where = r"(?: (?:now|shown|currently))?(?: (?:at|in|on))?(?: (?:the )?(?:position|place|slot|number))?"
    text = re.sub(rf"\b(?:the )?{PIECE}{where} #?([0-9]{{1,2}})\b", r"piece:\1", text)
    if question.pair:
        for number, ordinal in enumerate(ORDINALS, start=1):
            text = re.sub(
                rf"\bthe {ordinal}\b(?= (?:is|was|lies|goes|belongs|must|should)\b|[.,]|$)", f"piece:{number}", text
            )
        verb = r"(?= (?:is|was|looks|goes|lies|belongs|must|should)\b)"
        text = re.sub(rf"(?<![\w:.])([0-9]{{1,2}}){verb}", r"piece:\1", text)
        text = re.sub(rf"\b({VERTICAL}|of|than|to) ([0-9]{{1,2}})\b", r"\1 piece:\2", text)
    if set(texts) == {"above", "below"}:
        # Of two pieces, the one at the top is above the other.
        text = re.sub(r"\b(?:on|at the) top\b(?! of)", "above", text)
        text = re.sub(r"\bat the bottom\b(?! of)", "below", text)
    if texts:
        any_option = "|".join(re.escape(option) for option in texts)
        found = rf"(?<![\w:])(?:{any_option})(?!\w)"
        text = re.sub(found, lambda match: "text:" + question.letter_of[match.group()].lower(), text)

    text = re.sub(r"\b(?:option|choice|letter) (?=letter:[a-z]\b)", "", text)
    # No clause ends behind these.
    text = re.sub(r"\b(is|are|be|answer|option|choice|conclusion|letter):(?![a-z])", r"\1", text)
    text = re.sub(r"\b(so|therefore|thus|hence|then|consequently),", r"\1", text)
    text = text.replace("at first", "thought")
    return re.sub(r"((?:letter|text):[a-z]), (?=(?:(?:and|or) )?(?:letter|text):[a-z])", r"\1 and ", text)


# "A" and "I" before one of these are a letter still, before any other word they are an article and a pronoun.
BEHIND_A_LETTER = r" +(?:is|was|it|and|or|because|since|as|fits|matches|works|does|can|seems|looks|would|must)\b"


def mention(match: re.Match, text: str, question: Question) -> str:
    """What a capital that stands alone becomes in the shorthand."""
    bracketed, letter = match.group(1), match.group(1) or match.group(2)
    if letter not in question.letters:
        return match.group()
    if not bracketed and letter in "AI":
        before, after = text[max(0, match.start() - 30) : match.start()], text[match.end() :][:30]
        announced = re.search(r"\b(?:option|choice|letter|answer|answer is) $", before, re.IGNORECASE)
        if re.match(r" +[a-z]", after) and not announced and not re.match(BEHIND_A_LETTER, after):
            return match.group()
    return f" letter:{letter.lower()} "


# ---------------------------------------------------------------------------------------------------------------------
# Options: what a text claims

# Words that may stand between a subject and what is said of it, "the piece | must have been just | above".
LINKS = frozenset(
    "is was are be been being must should would will did does do can has have had to the on at in a an it's that's "
    "best better just directly diagonally immediately located placed positioned situated found originally then "
    "therefore clearly probably likely definitely certainly quite very further also indeed goes go went lies lay sits "
    "stands belongs belonged comes came fits fit looks looked seems appears exactly really most with not never".split()
)
NEGATIONS = frozenset(["not", "never"])
PRONOUNS = frozenset("it this that which".split())
PIECES = frozenset("piece patch tile part block segment one".split())
DETERMINERS = frozenset("the this that".split())
SUBJECTS = (
    PRONOUNS
    | PIECES
    | frozenset(
        "i answer option choice letter solution conclusion result color colour shape leaves choose pick select get "
        "conclude say point points position relationship relation direction".split()
    )
)
CONCLUSIONS = frozenset("so therefore thus hence consequently answer option choice conclude leaves".split())
CONNECTORS = CONCLUSIONS | frozenset("and but then that think say see means suggests".split())
RETRACTIONS = frozenset("wait hmm actually however but mistake recheck correction".split())
HYPOTHESES = frozenset(
    "if whether could might may maybe perhaps possibly suppose assume assuming either neither both thought tried "
    "try options choices unless unclear unsure now currently".split()
)
EXCLUSIONS = frozenset("rule ruled excluded exclude eliminate eliminated reject rejected discard".split())
GOOD = frozenset("correct fits fit matches match works best true".split())
BAD = frozenset("wrong incorrect false too impossible unlikely implausible excluded eliminated out fails".split())
# Between a direction and the piece behind it, and what may stand there instead of a numbered piece
JOINTS = frozenset("side corner of relative to than from compared with the that".split())
BESIDE = frozenset("it other and in before originally".split())
CLAUSE = re.compile(r"[,;()—]|:(?![a-z0-9])|\b(?:because|since|while|whereas|although|though|as)\b|\b(?=but\b)")
WORD = re.compile(r"[a-z]+:[a-z0-9]+|[^\W_]+(?:'[a-z]+)?")


class Claim(NamedTuple):
    kind: str  # "letter" or "text": how the option was named
    letter: str
    denied: bool
    firm: bool


def claims_of(words: list[str], question: Question, topic: str = "") -> list[Claim]:
    """The claims of one clause in shorthand. topic: the piece that "it" means, "" if none was named, or "several"."""
    claims = []
    excluded = bool(EXCLUSIONS & set(words))
    for place, word in enumerate(words):
        kind, _, letter = word.partition(":")
        if kind not in ("letter", "text"):
            continue

        # Back over the links to the subject: "piece:1 | is not | text:a"
        start = place
        while start > 0 and words[start - 1] in LINKS:
            start -= 1
        subject = words[start - 1] if start > 0 else ""
        before = words[start - 2] if start > 1 else "the"
        if subject in PRONOUNS | PIECES and before not in CONNECTORS | DETERMINERS:
            subject = "something"  # "the house behind it is red", "the dark piece is above"
        behind = words[place + 1 :]
        denied = excluded or bool(NEGATIONS & set(words[start:place]))
        firm = bool(CONCLUSIONS & set(words[:place]))

        # "A or B", "red and green": one of several, so neither. A list that is ruled out is ruled out as a whole.
        listed = bool({"or", "nor", "and"} & {subject, *behind[:1]})
        mentions = [other for other in words if other.startswith(("letter:", "text:"))]
        one_of_several = listed and len(mentions) > 1 and not excluded

        if kind == "letter":
            verdict = verdict_on_letter(subject, behind)
            if denied or verdict == "bad":
                claims.append(Claim(kind, letter.upper(), True, firm))
            elif verdict == "good" and not one_of_several:
                claims.append(Claim(kind, letter.upper(), False, firm))
        elif question.about_directions:
            if subject in PRONOUNS | PIECES and topic:
                subject = topic
            said = direction_said(letter.upper(), subject, behind, question)
            if said:
                claims.append(Claim(kind, said, denied, firm))
        elif text_said(subject, behind, question) and not one_of_several:
            claims.append(Claim(kind, letter.upper(), denied, firm))
    return claims


def stands_alone(subject: str, behind: list[str]) -> bool:
    """Whether an option is all that a clause holds, or all behind its "so"."""
    rest = [word for word in behind if not word.startswith(("letter:", "text:"))]
    return not rest and (not subject or subject in CONCLUSIONS)


def verdict_on_letter(subject: str, behind: list[str]) -> str | None:
    """ "good" if a clause takes the letter between these words, "bad" if it refuses it, else None."""
    for word in behind:
        if word in BAD or word in NEGATIONS:
            return "bad"
        if word in GOOD:
            return "good"
        if word not in LINKS and word not in SUBJECTS:
            break
    taken = subject in SUBJECTS or subject.startswith("text:") or behind[:2] == ["it", "is"]
    return "good" if taken or stands_alone(subject, behind) else None


def text_said(subject: str, behind: list[str], question: Question) -> bool:
    """Whether a clause says an option's text between these words of what the question asks for."""
    if {*behind} & (BAD | NEGATIONS):
        return False
    if stands_alone(subject, behind):
        return True
    asked = subject in SUBJECTS or subject in question.words
    if question.pair:
        asked = asked or subject == f"piece:{question.pair[0]}"
    rest = [word for word in behind if not word.startswith("letter:")]
    return asked and len(rest) <= 1  # "it is a green car", but not "it is green on the left"


def direction_said(letter: str, subject: str, behind: list[str], question: Question) -> str | None:
    """The letter that follows from "subject | is | direction | of another", or None.

    It is the opposite one if the clause speaks of the other piece: "2 is above 1" where 1 relative to 2 is asked.
    """
    if {*behind} & (BAD | NEGATIONS):
        return None
    unnamed = not subject or subject in CONCLUSIONS or subject in SUBJECTS
    if not unnamed and not subject.startswith("piece:"):
        return None
    rest = [word for word in behind if word not in JOINTS and not word.startswith("letter:")]
    beside = rest[0] if rest else ""
    if beside and not beside.startswith("piece:") and beside not in BESIDE:
        return None  # above something else

    named = ("" if unnamed else subject.removeprefix("piece:"), beside[6:] if beside.startswith("piece:") else "")
    if named == ("", ""):
        return letter
    if question.pair is None:
        return None
    asked, other = question.pair
    if named in ((asked, other), (asked, ""), ("", other)):
        return letter
    if named in ((other, asked), (other, ""), ("", asked)):
        return question.letter_of.get(opposite(question.text_of(letter)))
    return None


def topic_after(words: list[str], topic: str) -> str:
    """The piece that "it" means behind a clause: the one it begins with, or the only one it names."""
    pieces = [word for word in words if word.startswith("piece:")]
    if not pieces:
        return topic
    opens = set(words[: words.index(pieces[0])]) <= CONNECTORS
    return pieces[0] if opens or len(set(pieces)) == 1 else "several"


@dataclass
class Stance:
    """What a text holds so far, by one kind of claim."""

    said: set[str] = field(default_factory=set)
    firm: bool = False

    def hear(self, claim: Claim, replaces: bool) -> None:
        """A firm claim goes before all others; a second one beside it makes the text undecided."""
        if claim.firm > self.firm or replaces and not self.firm:
            self.said.clear()
        self.firm = self.firm or claim.firm
        self.said.add(claim.letter)


def conclusions(text: str, record: dict) -> tuple[list[set[str]], set[str]]:
    """What a text holds in the end: (letters that are said, once by letters and once by texts; letters it denies).

    Only the firmer of the two kinds is given, both if they are equally firm. Claims that are not firm count in the last
    two sentences only, and there a later sentence goes before an earlier one.
    """
    question = question_of(record)
    sentences = sentences_of(shorthand(undress(text), question))
    stances, denied, topic = {"letter": Stance(), "text": Stance()}, set(), ""
    for number, sentence in enumerate(sentences):
        if sentence.rstrip().endswith("?"):
            continue  # a question says nothing
        at_the_end = number >= len(sentences) - 2
        supposes = re.search(r"\bif\b", sentence)
        # "It is left of 1 and below it": one option in two parts. Which one is left undecided.
        mentioned = {question.text_of(letter.upper()) for letter in re.findall(r"text:([a-z])", sentence)}
        in_parts = mentioned & {"above", "below"} and mentioned & {"left", "right"}
        heard = set()
        for clause in CLAUSE.split(sentence):
            words = WORD.findall(clause)
            if RETRACTIONS & set(words) or words == ["no"]:
                stances, denied = {"letter": Stance(), "text": Stance()}, set()
            if HYPOTHESES & set(words) or (supposes and {"would", "then"} & set(words)):
                continue
            claims = claims_of(words, question, topic)
            topic = topic_after(words, topic)
            for claim in claims:
                part = in_parts and claim.kind == "text" and question.text_of(claim.letter) in OPPOSITE
                if part or not (claim.firm or at_the_end):
                    continue
                if claim.denied:
                    denied.add(claim.letter)
                    continue
                # "It is above the other. It is left of it." adds up to a third option, and is left undecided.
                first_here = claim.kind not in heard
                stances[claim.kind].hear(claim, replaces=first_here and not question.about_directions)
                heard.add(claim.kind)

    spoken = [stance for stance in stances.values() if stance.said]
    firm = any(stance.firm for stance in spoken)
    return [stance.said for stance in spoken if stance.firm == firm], denied
