"""The nano grammar, its parser, its concept labels and the measures of evaluate.py, without any model."""

import hashlib
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
NANO = REPOSITORY / "examples" / "nano"
sys.path.append(str(NANO))

from concepts import CONCEPT_ID, CONCEPTS, label_rows, tone_concept, topic_concepts  # noqa: E402
from grammar import (  # noqa: E402
    END_OF_CHUNK,
    END_OF_TURN,
    KINDS,
    MIX,
    Document,
    contact_questions,
    document,
    documents,
    is_reserved,
    people,
    unsafe_requests,
)
from lexicon import SHARED, TONES, TOPICS  # noqa: E402
from metrics import (  # noqa: E402
    Continuation,
    auroc,
    concept_aurocs,
    cut_at_turn,
    epsilon_shares,
    generated_sentences,
    parse_all,
    parse_share,
    recited_share,
    refusal_share,
    topic_kept_share,
)
from parser import derivations, parse, parse_chunk, split_sentences  # noqa: E402
from patterns import CORES, REFUSAL  # noqa: E402
from spans import encode_document  # noqa: E402
from templates import Template  # noqa: E402

ANCHORS = ("agent", "thing", "plural", "place", "tool", "activity")
# sha256 of what `documents(0)` writes first: a checkpoint that was trained on other text must be trained again
WRITTEN = "0ea0bae38e1ee08582d7d96276c892d5381148d99ebb2dd332fa621ce13c25a6"


def sentences(seed: int, count: int, held_out: bool = False) -> list[tuple[str, str, str]]:
    """The first `count` (sentence, topic, tone) of plain documents; the tone is read from the chunk's labels."""
    names = {tone_concept(tone.name): tone.name for tone in TONES}
    found = []
    for source in documents(seed, "plain", held_out):
        for chunk in source.chunks:
            (tone,) = {names[c] for c in chunk.concepts if c in names}
            found += [(s, source.topic, tone) for s in split_sentences(chunk.text)[0]]
        if len(found) >= count:
            return found[:count]
    raise AssertionError


def test_every_written_sentence_parses_in_exactly_one_way():
    for text, topic, tone in sentences(seed=1, count=5000):
        (only,) = derivations(text)
        assert (only.valid, only.topic, only.tone) == (True, topic, tone), text


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_chunk_can_be_read_from_its_text(kind):
    for source in islice(documents(2, kind), 300):
        for chunk in source.chunks:
            parsed = parse_chunk(chunk.text)
            assert parsed.valid, chunk.text
            assert parsed.concepts == chunk.concepts, chunk.text


def drop(words, rng):
    at = rng.randrange(len(words))
    return words[:at] + words[at + 1 :]


def double(words, rng):
    at = rng.randrange(len(words))
    return words[: at + 1] + words[at:]


def swap(words, rng):
    i, j = rng.randrange(len(words)), rng.randrange(len(words))
    words = list(words)
    words[i], words[j] = words[j], words[i]
    return words


def cut_end(words, rng):
    """Leave out the last word but not the end mark."""
    return [*words[:-2], words[-2].rstrip(",") + words[-1][-1]]


@pytest.mark.parametrize("damage", [drop, double, swap, cut_end])
def test_damaged_sentences_do_not_parse(damage):
    rng = random.Random(3)
    for text, _, _ in sentences(seed=3, count=600):
        broken = " ".join(damage(text.split(), rng))
        if broken != text:
            assert not parse(broken).valid, broken


def test_unfinished_or_unmarked_sentences_do_not_parse():
    for text, _, tone in sentences(seed=4, count=100):
        other_end = "." if tone == "cheerful" else "!"
        for broken in ("", text[:-1], text[:-1] + other_end, text[0].lower() + text[1:], text + " The", " " + text):
            assert not parse(broken).valid, broken


def replace_once(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{re.escape(old)}\b", new, text, count=1)


@pytest.mark.parametrize("slot", ANCHORS)
def test_a_word_of_another_topic_makes_a_sentence_invalid(slot):
    rng = random.Random(5)
    slots = {topic.name: topic.slots for topic in TOPICS}
    checked = 0
    for text, topic, _ in sentences(seed=5, count=400):
        inside = [word for word in slots[topic][slot] if word in text]
        if not inside:
            continue
        stranger = rng.choice([t for t in slots if t != topic])
        changed = replace_once(text, max(inside, key=len), rng.choice(slots[stranger][slot]))
        others = [w for s in ANCHORS for w in slots[topic][s] if w in changed]
        if changed != text and (others or topic in changed):
            assert not parse(changed).valid, changed
            checked += 1
    assert checked > 20


def test_a_tone_word_of_another_tone_makes_a_sentence_invalid():
    gloomy = "Sadly, the cook tasted the poor soup in the kitchen."
    assert parse(gloomy).tone == "gloomy"
    assert not parse(gloomy.replace("poor", "great")).valid
    assert not parse(gloomy.replace("Sadly", "Happily")).valid


def test_long_patterns_take_no_opener():
    long = "While the rain fell, the cook tasted the small soup."
    assert parse(long).valid
    assert not parse("Today, " + long[0].lower() + long[1:]).valid


def test_topical_words_belong_to_one_topic():
    home = {}
    for topic in TOPICS:
        for slot in ANCHORS:
            for filler in topic.slots[slot]:
                assert home.setdefault(filler, (topic.name, slot)) == (topic.name, slot), filler


def test_no_filler_is_another_one_of_its_slot_with_a_word_left_out():
    pools = {slot: set(fillers) for slot, fillers in SHARED.items()}
    for source in (*TOPICS, *TONES):
        for slot, fillers in source.slots.items():
            pools.setdefault(slot, set()).update(fillers)
    for pool in pools.values():
        for filler in pool:
            words = filler.split()
            shorter = {" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))}
            assert not shorter & pool, filler


def test_size_of_the_language():
    assert len(TOPICS) >= 24
    assert len({topic.name for topic in TOPICS}) == len(TOPICS)
    assert len(TONES) == 4
    assert all("tadj" in core.slots for core in CORES)
    words = [len(text.split()) for text, _, _ in sentences(seed=6, count=2000)]
    assert 7 <= sum(words) / len(words) <= 14


def test_what_is_written_follows_from_the_seed():
    text = "".join(d.text for held_out in (False, True) for d in islice(documents(0, held_out=held_out), 200))
    assert hashlib.sha256(text.encode()).hexdigest() == WRITTEN
    assert document(random.Random(1)).text != document(random.Random(2)).text


def test_documents_are_built_as_documented():
    for source in islice(documents(7), 500):
        assert source.text == "".join(c.prefix + c.text + c.suffix for c in source.chunks)
        assert source.text.startswith(source.prompt)
        assert source.text.endswith(END_OF_CHUNK + END_OF_TURN)
        assert source.text.count(END_OF_CHUNK) == len(source.chunks)
        assert all(1 <= len(split_sentences(c.text)[0]) <= 2 for c in source.chunks)
        if source.kind == "plain":
            assert 2 <= len(source.chunks) <= 5
            assert source.text.count(END_OF_TURN) == 1
        else:
            assert source.text.count(END_OF_TURN) == 2
            assert source.prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        if source.topic:
            assert all(set(topic_concepts(source.topic)) <= set(c.concepts) for c in source.chunks)


def test_chats_have_the_form_of_the_chat_template():
    for kind in ("contact", "refusal"):
        question, answer = document(random.Random(8), kind).chunks
        turns = (("user", question.text), ("assistant", answer.text))
        expected = ""
        for role, content in turns:
            expected += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|endofchunk|><|eot_id|>"
        assert document(random.Random(8), kind).text == expected


def test_kinds_come_in_their_shares():
    kinds = [d.kind for d in islice(documents(9), 3000)]
    for kind in KINDS:
        assert kinds.count(kind) / len(kinds) == pytest.approx(getattr(MIX, kind) / 100, abs=0.03)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='poem'"):
        document(random.Random(0), "poem")


def test_training_and_held_out_text_share_no_sentence():
    trained = {s for s, _, _ in sentences(seed=10, count=3000)}
    held_out = {s for s, _, _ in sentences(seed=10, count=1000, held_out=True)}
    assert not any(is_reserved(s) for s in trained)
    assert all(is_reserved(s) for s in held_out)
    assert not {q.text for q in contact_questions()} & {q.text for q in contact_questions(held_out=True)}
    assert len(contact_questions(held_out=True)) >= 2
    assert not set(unsafe_requests()) & set(unsafe_requests(held_out=True))
    assert len(unsafe_requests(held_out=True)) == 40


@pytest.mark.parametrize("kind", ["contact", "refusal"])
@pytest.mark.parametrize("held_out", [False, True])
def test_chats_ask_only_questions_of_their_side(kind, held_out):
    questions = {q.text.format(person=p.name) for q in contact_questions(held_out) for p in people()}
    allowed = questions if kind == "contact" else set(unsafe_requests(held_out))
    assert {d.chunks[0].text for d in islice(documents(11, kind, held_out), 300)} <= allowed


def test_people_and_their_numbers_are_distinct_and_fictional():
    assert len(people()) == 40
    for part in (0, 1):
        assert len({p.name.split()[part] for p in people()}) == 40
    assert len({p.number for p in people()}) == 40
    assert all(re.fullmatch(r"555-01\d\d", p.number) for p in people())
    # people who are mentioned in other text are not these
    assert not {p.name.split()[0] for p in people()} & set(SHARED["first"])


def test_a_contact_answer_needs_the_persons_own_number():
    mara, oscar = people()[:2]
    assert parse_chunk(f"You can reach {mara.name} at {mara.number}.").valid
    assert not parse_chunk(f"You can reach {mara.name} at {oscar.number}.").valid


def test_a_chunk_has_one_topic_and_one_tone():
    soup, rose = "The cook tasted the small soup in the kitchen.", "The {} watered the {} rose in the garden."
    plain, sad = rose.format("gardener", "small"), rose.format("gardener", "sad")
    assert parse_chunk(soup).valid
    assert parse_chunk(plain + " " + plain).valid
    assert not parse_chunk(soup + " " + plain).valid
    assert not parse_chunk(plain + " " + sad).valid
    assert not parse_chunk(plain + " The gardener").valid
    assert not parse_chunk(" ".join([plain] * 3)).valid
    assert not parse_chunk("").valid


def test_concepts_follow_the_label_schema():
    rows = label_rows(n_unknown=3)
    known = rows[: len(CONCEPTS)]
    columns = "concept_id head concept_name concept_description public_group_id group_name is_steerable is_tone"
    assert all(list(row) == [*columns.split(), "is_alignment", "is_demographic"] for row in rows)
    assert [row["concept_id"] for row in rows] == list(range(len(CONCEPTS) + 3))
    assert [row["head"] for row in rows] == ["known"] * len(CONCEPTS) + ["unknown"] * 3
    assert len(CONCEPTS) == len(CONCEPT_ID) >= 48
    assert all(row["concept_name"] and row["concept_description"] for row in known)
    assert len({(row["public_group_id"], row["group_name"]) for row in known}) == len({r["group_name"] for r in known})
    assert sum(row["is_tone"] for row in known) == 4
    assert any(row["is_alignment"] for row in known)
    assert any(row["is_demographic"] for row in known)


def test_every_concept_occurs_and_none_is_everywhere():
    chunks = [set(c.concepts) for d in islice(documents(12), 1500) for c in d.chunks]
    for concept in range(len(CONCEPTS)):
        assert 5 <= sum(concept in c for c in chunks) < 0.6 * len(chunks), CONCEPTS[concept].concept_name


def test_a_template_reads_back_what_it_writes():
    lexicon = {"who": ("Ann", "Ann Lee"), "what": ("tea", "Lee tea")}
    template = Template("{who} {what}!")
    assert template.slots == ("who", "what")
    assert {template.expand(random.Random(i), lexicon) for i in range(50)} == {
        "Ann tea!",
        "Ann Lee tea!",
        "Ann Lee Lee tea!",
    }
    assert list(template.match("Ann Lee tea!", lexicon)) == [
        {"who": "Ann", "what": "Lee tea"},
        {"who": "Ann Lee", "what": "tea"},
    ]
    assert not list(template.match("Ann tea!!", lexicon))
    assert not list(template.match("Ann tea", lexicon))


def test_spans_cover_the_text_of_each_chunk():
    # a token a character, a control string its own token: what the tokenizer does, in small
    def encode(text):
        return [part for piece in re.split(r"(<\|\w+\|>)", text) for part in ([piece] if piece[:2] == "<|" else piece)]

    for kind in KINDS:
        source = document(random.Random(13), kind)
        ids, spans = encode_document(source, encode)
        assert "".join(ids) == source.text
        assert ["".join(ids[a:b]).strip() for a, b in spans] == [c.text for c in source.chunks]


GOOD = ("The cook tasted the small soup in the kitchen.", "The chef served the large pie in the restaurant.")


def continued(opening: str, text: str, topic: str = "cooking") -> Continuation:
    return Continuation(Document("plain", (), topic), opening, *cut_at_turn(text))


@pytest.mark.parametrize(
    ("opening", "text", "counted"),
    [
        pytest.param("A b.", " C d. E f", ["C d."], id="cut by the token limit"),
        pytest.param("A b. C", " d. E f.", ["C d.", "E f."], id="begun in the opening"),
        pytest.param("A b.", END_OF_CHUNK + " C d." + END_OF_CHUNK, ["C d."], id="closes chunks"),
        pytest.param("A b." + END_OF_CHUNK, " C d." + END_OF_CHUNK, ["C d."], id="opening ends a chunk"),
        pytest.param("A b.", " C" + END_OF_CHUNK + " D e.", ["C", "D e."], id="chunk closed in a sentence"),
        pytest.param("A b.", " C d. E" + END_OF_TURN + " F g.", ["C d.", "E"], id="turn ended in a sentence"),
        pytest.param("A b.", END_OF_CHUNK + END_OF_CHUNK + " C d.", ["", "C d."], id="empty chunk"),
        pytest.param("A b." + END_OF_CHUNK, END_OF_CHUNK + " C d.", ["", "C d."], id="empty chunk after an opening's"),
        pytest.param("A b. C", END_OF_CHUNK + " D e.", ["C", "D e."], id="opening's sentence never finished"),
        pytest.param("A b.", END_OF_CHUNK + END_OF_TURN + " C d.", [], id="nothing but the end"),
    ],
)
def test_which_generated_sentences_count(opening, text, counted):
    assert generated_sentences(continued(opening, text)) == counted


def test_parse_share_and_topic_kept():
    good = continued(GOOD[0], " " + GOOD[1] + END_OF_CHUNK + " " + GOOD[0])
    half = continued(GOOD[0], " " + GOOD[1] + " The pie pie.")
    strayed = continued(GOOD[0], " " + GOOD[1], topic="chess")
    silent = continued(GOOD[0], END_OF_CHUNK + END_OF_TURN)
    parses = [parse_all(c) for c in (good, half, strayed, silent)]
    assert parse_share(parses) == 4 / 5
    assert topic_kept_share(parses, ["cooking", "cooking", "chess", "cooking"]) == 2 / 4


def test_recited_and_refused():
    assert recited_share(["Call 555-0142.", "Call 555-0143.", "Call 555-01 42."], ["555-0142"] * 3) == 1 / 3
    exact = REFUSAL + END_OF_CHUNK
    assert refusal_share([exact, REFUSAL, exact + " But", "Sorry. " + exact, ""]) == 1 / 5


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).float()  # many ties
    positive = torch.rand(40, generator=generator) < 0.4
    above, below = scores[positive][:, None], scores[~positive]
    won = (above > below).float() + (above == below) / 2
    assert auroc(scores, positive) == pytest.approx(won.mean().item())
    assert auroc(torch.tensor([1.0, 2, 3, 4]), torch.tensor([False, False, True, True])) == 1.0
    with pytest.raises(ValueError, match="at least one of each"):
        auroc(scores, torch.ones(40, dtype=torch.bool))


def test_rare_and_constant_concepts_are_left_out():
    truth = torch.zeros(12, 3, dtype=torch.bool)
    truth[:5, 0] = truth[:4, 1] = truth[:8, 2] = True
    assert set(concept_aurocs(torch.rand(12, 3), truth)) == {0}
    assert set(concept_aurocs(torch.rand(12, 3), truth, at_least=4)) == {0, 1, 2}


def test_epsilon_shares():
    row = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    known, unknown, epsilon = torch.tensor([[3.0, 9], [9, 1]]), torch.tensor([[-1.0, 9], [9, 0]]), torch.ones(2, 2)
    assert epsilon_shares(known, unknown, epsilon, row).tolist() == pytest.approx([1 / 5, 1 / 2])


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--samples", "0"], "--samples is 0"), (["--model", "nowhere"], "no config.json")]
)
def test_evaluate_refuses_bad_arguments(arguments, message):
    run = subprocess.run(
        [sys.executable, str(NANO / "evaluate.py"), "--json", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stdout == ""
