"""The known concepts of steerling-nano, in the label schema of the released checkpoints.

Concept ids are positions in `CONCEPTS`: topics, topic groups, tones, features of a sentence, parts of a conversation.
They are rows of the known head, so inserting one invalidates every trained checkpoint.
"""

from dataclasses import asdict, dataclass

from lexicon import TONES, TOPIC_GROUPS, TOPICS


@dataclass(frozen=True)
class Concept:
    """A known concept: one row of `concept_labels` without its id and head."""

    concept_name: str
    concept_description: str
    group_name: str
    is_steerable: bool = True
    is_tone: bool = False
    is_alignment: bool = False
    is_demographic: bool = False


_TONE_DESCRIPTIONS = {
    "plain": "Neutral wording without praise, ceremony or complaint.",
    "cheerful": "Happy wording, warm adjectives and exclamation marks.",
    "formal": "The wording of reports and rules.",
    "gloomy": "Sad wording that expects the worst.",
}

_FEATURES: tuple[tuple[str, str, str], ...] = (
    ("place", "Says where something is or happens.", "setting"),
    ("time of day", "Says at what time of the day something happens.", "setting"),
    ("season", "Names spring, summer, autumn or winter.", "setting"),
    ("weather", "Rain, sun, wind, snow or fog during the event.", "setting"),
    ("quantity", "Counts things with a number word.", "reasoning"),
    ("cause", "Gives a reason with 'because'.", "reasoning"),
    ("comparison", "Compares two things.", "reasoning"),
    ("negation", "Denies that something happened.", "reasoning"),
    ("condition", "An 'if' clause and what follows from it.", "reasoning"),
    ("purpose", "Says what is needed in order to do something.", "reasoning"),
    ("sequence", "Orders events in time: when, before, begins and ends.", "reasoning"),
    ("tool use", "A tool with which something is done.", "action"),
    ("activity", "Names an activity by its gerund, such as 'writing code'.", "action"),
    ("teaching", "Someone teaches or asks someone else.", "action"),
    ("named person", "Mentions a person by name.", "people"),
)


def _build() -> tuple[Concept, ...]:
    rows = [Concept(t.name, f"Text about {t.name}.", TOPIC_GROUPS[t.group]) for t in TOPICS]
    for group, label in TOPIC_GROUPS.items():
        members = ", ".join(t.name for t in TOPICS if t.group == group)
        rows.append(Concept(label, f"Text about any of: {members}.", label))
    rows += [Concept(f"{t.name} tone", _TONE_DESCRIPTIONS[t.name], "tone", is_tone=True) for t in TONES]
    rows += [Concept(*feature) for feature in _FEATURES]
    rows += [
        Concept("families and children", "Children and their parents.", "people", is_demographic=True),
        Concept("older people", "The older people of a town.", "people", is_demographic=True),
        Concept("user turn", "What a user says to the assistant.", "conversation", is_steerable=False),
        Concept("question", "A sentence that asks something.", "conversation", is_steerable=False),
        Concept("topic request", "Asks the assistant to write about a topic.", "conversation", is_steerable=False),
        Concept("direct answer", "A one-sentence reply of the assistant.", "conversation", is_steerable=False),
        Concept("contact information", "How to reach a person: asked or answered.", "privacy", is_alignment=True),
        Concept("phone number", "States a person's phone number.", "privacy", is_alignment=True),
        Concept("unsafe request", "Asks for help with something harmful.", "safety", is_alignment=True),
        Concept("refusal", "Declines to help.", "safety", is_alignment=True),
    ]
    return tuple(rows)


CONCEPTS: tuple[Concept, ...] = _build()
CONCEPT_ID: dict[str, int] = {concept.concept_name: i for i, concept in enumerate(CONCEPTS)}
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(concept.group_name for concept in CONCEPTS))


def topic_concepts(topic: str) -> tuple[int, int]:
    """Return the ids of a topic and of the group it belongs to."""
    group = next(t.group for t in TOPICS if t.name == topic)
    return CONCEPT_ID[topic], CONCEPT_ID[TOPIC_GROUPS[group]]


def tone_concept(tone: str) -> int:
    """Return the id of a tone's concept."""
    return CONCEPT_ID[f"{tone} tone"]


def concept_ids(*names: str) -> tuple[int, ...]:
    """Return the ids of concepts by name."""
    return tuple(CONCEPT_ID[name] for name in names)


def label_rows(n_unknown: int = 0) -> list[dict]:
    """Return the rows of `concept_labels`: the known concepts, then `n_unknown` discovered ones.

    Unknown ids are offset by the number of known concepts. A discovered concept has no name until someone studies it;
    its row says so by an empty name, and it is in no group (`public_group_id` -1).
    """
    rows = []
    for i, concept in enumerate(CONCEPTS):
        fields = asdict(concept)
        group = fields.pop("group_name")
        name, description = fields.pop("concept_name"), fields.pop("concept_description")
        rows.append(
            {
                "concept_id": i,
                "head": "known",
                "concept_name": name,
                "concept_description": description,
                "public_group_id": GROUPS.index(group),
                "group_name": group,
                **fields,
            }
        )
    flags = dict.fromkeys(("is_tone", "is_alignment", "is_demographic"), False)
    for i in range(n_unknown):
        rows.append(
            {
                "concept_id": len(CONCEPTS) + i,
                "head": "unknown",
                "concept_name": "",
                "concept_description": "",
                "public_group_id": -1,
                "group_name": "",
                "is_steerable": True,
                **flags,
            }
        )
    return rows
