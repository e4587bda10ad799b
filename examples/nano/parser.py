"""Read sentences of the nano grammar back: valid or not, which topic, which tone, which concepts.

A sentence is valid if the grammar could have written it. The matchers are the very templates and tables that write, so
there is no second description of the language that could drift.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from concepts import concept_ids
from grammar import (
    CONTACT_ANSWER_CONCEPTS,
    CONTACT_QUESTION_CONCEPTS,
    REFUSAL_CONCEPTS,
    UNSAFE_CONCEPTS,
    people,
    sentence_concepts,
    sentence_lexicon,
    topic_request_concepts,
)
from lexicon import TONES, TOPICS, UNSAFE_DEEDS, Tone
from patterns import (
    CONTACT_ANSWERS,
    CONTACT_QUESTIONS,
    CORES,
    HELD_OUT_CONTACT_QUESTIONS,
    REFUSAL,
    TOPIC_REQUESTS,
    UNSAFE_REQUESTS,
)

_SENTENCE = re.compile(r"[^.!?]*[.!?]")


@dataclass(frozen=True)
class Parsed:
    """What a sentence or a chunk says.

    Attributes:
        valid: whether the grammar can write it.
        topic: its topic, or None (a contact answer has none; an invalid text has none).
        tone: its tone, or None; a chunk has one tone.
        concepts: sorted ids of the known concepts that it expresses.
    """

    valid: bool
    topic: str | None = None
    tone: str | None = None
    concepts: tuple[int, ...] = ()


INVALID = Parsed(False)


def split_sentences(text: str) -> tuple[list[str], str]:
    """Split a text behind each '.', '!' or '?'; return the complete sentences and the incomplete rest ("" if none)."""
    sentences = [s.strip() for s in _SENTENCE.findall(text)]
    return sentences, _SENTENCE.sub("", text).strip()


def _lowered(text: str) -> tuple[str, ...]:
    # the capital letter belongs to the sentence or to a name: try both
    return (text, text[0].lower() + text[1:])


def _frames(sentence: str, tone: Tone):
    """Yield (core text, framed) for every way to take opener, closer and end mark off a sentence."""
    if not sentence.endswith(tone.end) or not sentence[0].isupper():
        return
    body = sentence[: -len(tone.end)]
    for core in _lowered(body):
        yield core, False
    for opener in tone.slots["opener"]:
        if body.startswith(opener + " "):
            rest = body[len(opener) + 1 :]
            yield rest, True
    for closer in tone.slots["closer"]:
        if body.endswith(closer):
            for core in _lowered(body[: -len(closer)]):
                if core:
                    yield core, True


@lru_cache(maxsize=1)
def _anchors() -> dict[str, frozenset[str]]:
    """Map each word of a topical slot to the topics that have it, so that only few topics need be tried."""
    found: dict[str, set[str]] = {}
    for topic in TOPICS:
        for slot in ("agent", "thing", "plural", "activity"):
            for filler in topic.slots[slot]:
                for word in filler.split():
                    found.setdefault(word, set()).add(topic.name)
    return {word: frozenset(topics) for word, topics in found.items()}


def derivations(sentence: str) -> list[Parsed]:
    """Return every way in which the grammar writes `sentence` on a topic: one at most, as the tests show."""
    if not sentence:
        return []
    words = re.findall(r"[\w'-]+", sentence.lower())
    candidates = set().union(*(_anchors().get(word, ()) for word in words))
    found = []
    for tone in TONES:
        for core_text, framed in _frames(sentence, tone):
            for topic in TOPICS:
                if topic.name not in candidates:
                    continue
                lexicon = sentence_lexicon(topic, tone)
                for core in CORES:
                    if framed and not core.framed:
                        continue
                    for _ in core.match(core_text, lexicon):
                        ids = tuple(sorted(set(sentence_concepts(topic.name, tone.name, core))))
                        found.append(Parsed(True, topic.name, tone.name, ids))
    return found


def parse(sentence: str) -> Parsed:
    """Parse one sentence of a text on a topic, end mark included.

    Sentences of a conversation (questions, requests, answers) are judged whole, by `parse_chunk`.
    """
    found = derivations(sentence)
    return found[0] if found else INVALID


def _conversation(text: str) -> Parsed | None:
    names = {"person": tuple(p.name for p in people())}
    user = concept_ids("user turn", *(("question",) if "?" in text else ()))
    answer = concept_ids("direct answer")

    def parsed(ids, topic=None, tone=None):
        return Parsed(True, topic, tone, tuple(sorted(set(ids))))

    if text == REFUSAL:
        return parsed((*answer, *REFUSAL_CONCEPTS))
    for pattern in (*CONTACT_QUESTIONS, *HELD_OUT_CONTACT_QUESTIONS):
        for _ in pattern.match(text, names):
            return parsed((*user, *CONTACT_QUESTION_CONCEPTS))
    for person in people():
        for pattern in CONTACT_ANSWERS:
            for _ in pattern.match(text, {"person": (person.name,), "phone": (person.number,)}):
                return parsed((*answer, *CONTACT_ANSWER_CONCEPTS))
    topics, tones = tuple(t.name for t in TOPICS), tuple(t.name for t in TONES)
    for pattern in TOPIC_REQUESTS:
        for slots in pattern.match(text, {"name": topics, "tone": tones}):
            tone = slots.get("tone")
            return parsed((*user, *topic_request_concepts(slots["name"], tone)), slots["name"], tone)
    for pattern in UNSAFE_REQUESTS:
        for _ in pattern.match(text, {"deed": UNSAFE_DEEDS}):
            return parsed((*user, *UNSAFE_CONCEPTS))
    return None


def parse_chunk(text: str) -> Parsed:
    """Parse a chunk: a turn of a conversation, or one or two sentences that agree in topic and tone.

    A contact answer is valid only with the person's own number.
    """
    text = text.strip()
    turn = _conversation(text)
    if turn is not None:
        return turn
    sentences, rest = split_sentences(text)
    if rest or not 1 <= len(sentences) <= 2:
        return INVALID
    parsed = [parse(sentence) for sentence in sentences]
    if not all(p.valid for p in parsed) or len({(p.topic, p.tone) for p in parsed}) > 1:
        return INVALID
    ids = tuple(sorted({c for p in parsed for c in p.concepts}))
    return Parsed(True, parsed[0].topic, parsed[0].tone, ids)
