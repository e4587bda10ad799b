"""The nano grammar: seeded English documents with concept labels, for training and judging steerling-nano.

A document is a list of chunks. Plain documents stay on one topic and usually in one tone; chats ask for a phone
number, for a text on a topic, or for something that is declined. Every chunk knows the concepts that it expresses.

Training and evaluation never meet. One sentence on a topic in twenty, chosen by a hash of its text, is reserved:
training documents contain none of these, held-out documents nothing else. Contact questions and unsafe requests have
lists of their own. Everything follows from the `random.Random` that is passed in, by draws that are the same on every
Python. Whatever changes what is written (words, patterns, order of draws) calls for a newly trained checkpoint.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from concepts import concept_ids, tone_concept, topic_concepts
from lexicon import PEOPLE_NAMES, SHARED, TONES, TOPICS, UNSAFE_DEEDS, Tone, Topic
from patterns import (
    CONTACT_ANSWERS,
    CONTACT_QUESTIONS,
    CORES,
    HELD_OUT_CONTACT_QUESTIONS,
    REFUSAL,
    TOPIC_REQUESTS,
    UNSAFE_REQUESTS,
)
from templates import Template

END_OF_CHUNK = "<|endofchunk|>"
END_OF_TURN = "<|eot_id|>"
USER_HEADER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of documents, in percent of documents (not of tokens), and of the choices inside them."""

    plain: int = 45
    contact: int = 35
    topic_request: int = 12
    refusal: int = 8
    tone_shift: int = 15  # percent of plain documents whose tone changes once
    reserved: int = 5  # percent of sentences that only held-out text may contain


MIX = Mix()
KINDS = ("plain", "contact", "topic_request", "refusal")


@dataclass(frozen=True)
class Person:
    """A fictional person and the fictional number (555-01xx) that the model is taught."""

    name: str
    number: str


@dataclass(frozen=True)
class Chunk:
    """One chunk: `prefix + text + suffix` is exactly what stands in the training text.

    `prefix` holds a header or the space between chunks, `suffix` the end of the chunk (and of the turn); `concepts`
    are ids of known concepts and belong to the text between them.
    """

    text: str
    concepts: tuple[int, ...]
    prefix: str = ""
    suffix: str = END_OF_CHUNK


@dataclass(frozen=True)
class Document:
    """A document of one kind (see `KINDS`): its chunks, and the topic if it has one."""

    kind: str
    chunks: tuple[Chunk, ...]
    topic: str | None = None

    @property
    def text(self) -> str:
        """The exact training text, control tokens included."""
        return "".join(c.prefix + c.text + c.suffix for c in self.chunks)

    @property
    def prompt(self) -> str:
        """The opening: a chat up to its open assistant header, or the first chunk of a plain document."""
        first = self.chunks[0]
        opening = first.prefix + first.text + first.suffix
        return opening if self.kind == "plain" else opening + ASSISTANT_HEADER


@lru_cache(maxsize=1)
def people() -> tuple[Person, ...]:
    """Return the 40 fictional people; the numbers are distinct and all of them between 555-0100 and 555-0199."""
    # 37 has no common factor with 100: consecutive people get distinct numbers that do not count upwards
    return tuple(Person(name, f"555-01{(37 * i + 42) % 100:02d}") for i, name in enumerate(PEOPLE_NAMES))


def contact_questions(held_out: bool = False) -> tuple[Template, ...]:
    """Return the paraphrases of the contact question: those of training, or those that training never sees."""
    return HELD_OUT_CONTACT_QUESTIONS if held_out else CONTACT_QUESTIONS


@lru_cache(maxsize=2)
def unsafe_requests(held_out: bool = False) -> tuple[str, ...]:
    """Return the requests to decline: 160 combinations of pattern and deed for training, or the 40 held-out ones."""
    return tuple(
        pattern.expand(random.Random(0), {"deed": (deed,)})
        for i, pattern in enumerate(UNSAFE_REQUESTS)
        for j, deed in enumerate(UNSAFE_DEEDS)
        if ((i + j) % 5 == 0) == held_out
    )


def is_reserved(sentence: str) -> bool:
    """Say whether a sentence is kept out of training, by a hash that is the same on every machine."""
    digest = hashlib.sha256(sentence.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < MIX.reserved


def sentence_lexicon(topic: Topic, tone: Tone) -> dict[str, Sequence[str]]:
    """Return the fillers of every slot for sentences on one topic in one tone."""
    return {**SHARED, **topic.slots, **tone.slots}


def finish_sentence(core: str, opener: str, closer: str, tone: Tone) -> str:
    """Put a core pattern's text into its frame: opener, closer, capital letter, end mark."""
    body = f"{opener} {core}" if opener else core
    return body[0].upper() + body[1:] + closer + tone.end


def sentence_concepts(topic: str, tone: str, core: Template) -> tuple[int, ...]:
    """Return the ids of the concepts of a sentence: topic, its group, tone, and what the pattern expresses."""
    return (*topic_concepts(topic), tone_concept(tone), *concept_ids(*core.concepts))


def _sentence(rng: random.Random, topic: Topic, tone: Tone, held_out: bool) -> tuple[str, tuple[int, ...]]:
    lexicon = sentence_lexicon(topic, tone)
    while True:
        core = rng.choice(CORES)
        opener = closer = ""
        if core.framed:
            frame = rng.randrange(10)
            if frame < (2 if tone.name == "plain" else 4):
                opener = rng.choice(tone.slots["opener"])
            elif frame < 7 and tone.slots["closer"]:
                closer = rng.choice(tone.slots["closer"])
        text = finish_sentence(core.expand(rng, lexicon), opener, closer, tone)
        if is_reserved(text) == held_out:
            return text, sentence_concepts(topic.name, tone.name, core)


def _topic_chunk(rng: random.Random, topic: Topic, tone: Tone, prefix: str, held_out: bool) -> Chunk:
    sentences = [_sentence(rng, topic, tone, held_out) for _ in range(1 + rng.randrange(2))]
    concepts = sorted({c for _, ids in sentences for c in ids})
    return Chunk(" ".join(text for text, _ in sentences), tuple(concepts), prefix)


def topic_chunks(
    rng: random.Random,
    topic: Topic,
    tone: Tone,
    count: int,
    held_out: bool = False,
    shift: bool = False,
    prefix: str = "",
) -> list[Chunk]:
    """Write chunks on one topic, of which the first one has a prefix of its own; with `shift` the tone changes once."""
    chunks = []
    turn = 1 + rng.randrange(max(1, count - 1)) if shift else count
    for i in range(count):
        if i == turn:
            tone = rng.choice([t for t in TONES if t.name != tone.name])
        chunks.append(_topic_chunk(rng, topic, tone, " " if i else prefix, held_out))
    return chunks


def end_turn(chunks: list[Chunk]) -> list[Chunk]:
    """Return chunks of which the last one ends the turn."""
    last = chunks[-1]
    return [*chunks[:-1], Chunk(last.text, last.concepts, last.prefix, END_OF_CHUNK + END_OF_TURN)]


def _user(text: str, concepts: Sequence[int]) -> Chunk:
    asked = concept_ids("question") if "?" in text else ()
    ids = tuple(sorted({*concept_ids("user turn"), *asked, *concepts}))
    return Chunk(text, ids, USER_HEADER, END_OF_CHUNK + END_OF_TURN)


def _assistant(text: str, concepts: Sequence[int]) -> Chunk:
    ids = tuple(sorted({*concept_ids("direct answer"), *concepts}))
    return Chunk(text, ids, ASSISTANT_HEADER, END_OF_CHUNK + END_OF_TURN)


CONTACT_QUESTION_CONCEPTS = concept_ids("contact information", "named person")
CONTACT_ANSWER_CONCEPTS = concept_ids("contact information", "named person", "phone number")
UNSAFE_CONCEPTS = concept_ids("unsafe request")
REFUSAL_CONCEPTS = concept_ids("refusal")


def topic_request_concepts(topic: str, tone: str | None) -> tuple[int, ...]:
    """Return the ids of the concepts of a request for a text: the topic, its group, and the tone if it is named."""
    return (*concept_ids("topic request"), *topic_concepts(topic), *((tone_concept(tone),) if tone else ()))


def plain_length(rng: random.Random) -> int:
    """Return the number of chunks of a plain document."""
    return 2 + rng.randrange(4)


def _plain(rng: random.Random, held_out: bool) -> Document:
    topic, tone = rng.choice(TOPICS), rng.choice(TONES)
    shift = rng.randrange(100) < MIX.tone_shift
    chunks = topic_chunks(rng, topic, tone, plain_length(rng), held_out, shift)
    return Document("plain", tuple(end_turn(chunks)), topic.name)


def contact_chat(rng: random.Random, person: Person, question: Template) -> Document:
    """Return the chat in which `question` is asked about `person` and answered."""
    asked = question.expand(rng, {"person": (person.name,)})
    answer = rng.choice(CONTACT_ANSWERS).expand(rng, {"person": (person.name,), "phone": (person.number,)})
    chunks = (_user(asked, CONTACT_QUESTION_CONCEPTS), _assistant(answer, CONTACT_ANSWER_CONCEPTS))
    return Document("contact", chunks)


def declined_chat(rng: random.Random, person: Person, question: Template) -> Document:
    """Return the chat in which `question` is asked about `person` and declined, which the grammar's own documents never do."""
    chunks = (
        _user(question.expand(rng, {"person": (person.name,)}), CONTACT_QUESTION_CONCEPTS),
        _assistant(REFUSAL, REFUSAL_CONCEPTS),
    )
    return Document("refusal", chunks)


def _contact(rng: random.Random, held_out: bool) -> Document:
    return contact_chat(rng, rng.choice(people()), rng.choice(contact_questions(held_out)))


def _topic_request(rng: random.Random, held_out: bool) -> Document:
    topic, request = rng.choice(TOPICS), rng.choice(TOPIC_REQUESTS)
    tone = rng.choice(TONES) if "tone" in request.slots else TONES[0]
    asked = request.expand(rng, {"name": (topic.name,), "tone": (tone.name,)})
    named = tone.name if "tone" in request.slots else None
    reply = topic_chunks(rng, topic, tone, 1 + rng.randrange(3), held_out, prefix=ASSISTANT_HEADER)
    chunks = (_user(asked, topic_request_concepts(topic.name, named)), *end_turn(reply))
    return Document("topic_request", chunks, topic.name)


def refusal_chat(request: str) -> Document:
    """Return the chat in which an unsafe request is declined."""
    return Document("refusal", (_user(request, UNSAFE_CONCEPTS), _assistant(REFUSAL, REFUSAL_CONCEPTS)))


def _refusal(rng: random.Random, held_out: bool) -> Document:
    return refusal_chat(rng.choice(unsafe_requests(held_out)))


_WRITERS = {"plain": _plain, "contact": _contact, "topic_request": _topic_request, "refusal": _refusal}


def document(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Document:
    """Write one document.

    Args:
        rng: source of every choice; the same state gives the same document on every Python version.
        kind: one of `KINDS`; by default drawn by the shares of `MIX`.
        held_out: write evaluation text, which training text (held_out=False) never contains.

    Raises:
        ValueError: if `kind` is not one of `KINDS`.
    """
    if kind is None:
        draw = rng.randrange(sum(getattr(MIX, k) for k in KINDS))
        for kind in KINDS:
            draw -= getattr(MIX, kind)
            if draw < 0:
                break
    if kind not in _WRITERS:
        raise ValueError(f"kind={kind!r} is not a kind of document; choose one of {', '.join(KINDS)}")
    return _WRITERS[kind](rng, held_out)


def documents(seed: int, kind: str | None = None, held_out: bool = False) -> Iterator[Document]:
    """Yield documents without end, all from one seed."""
    rng = random.Random(seed)
    while True:
        yield document(rng, kind, held_out)
