"""The words of the nano grammar: what each topic, tone and shared slot may say.

This is data only. `grammar.py` writes sentences from it and `parser.py` reads them back from the very same tables, so
a word added here is known to both. Nouns, places, tools and activities of one topic belong to no other topic: that is
what makes the topic of every sentence decidable. No filler is another one of its slot with a word left out, so that a
damaged sentence is no sentence. The tests check both. Words that follow "a" begin with a consonant sound.
"""

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


@dataclass(frozen=True)
class Topic:
    """One topic: its name, the group it belongs to, and the fillers of each topical slot."""

    name: str
    group: str
    slots: dict[str, tuple[str, ...]]


def _topic(name: str, group: str, *, verb: str, **slots: str) -> Topic:
    pairs = [pair.split("/") for pair in _words(verb)]
    fillers = {slot: _words(text) for slot, text in slots.items()}
    fillers["verb"] = tuple(base for base, _ in pairs)
    fillers["past"] = tuple(past for _, past in pairs)
    fillers["name"] = (name,)
    return Topic(name, group, fillers)


TOPICS: tuple[Topic, ...] = (
    _topic(
        "cooking",
        "home",
        agent="cook, chef, waiter",
        thing="soup, stew, dish, meal, pie, salad",
        plural="onions, carrots, potatoes, beans",
        verb="taste/tasted, serve/served, share/shared, season/seasoned",
        did="went cold, boiled too fast, cooled on the table",
        place="in the kitchen, on the stove, in the restaurant",
        tool="kitchen knife, copper pan",
        activity="chopping onions, setting the table, making dinner",
        adj="salty, spicy, tender, hot",
    ),
    _topic(
        "gardening",
        "home",
        agent="neighbor, planter, gardener",
        thing="rose, hedge, lawn, flower bed, vine, compost",
        plural="seeds, weeds, roots, leaves",
        verb="water/watered, plant/planted, move/moved, feed/fed",
        did="lost its color, grew fast, dried in the sun",
        place="in the garden, behind the shed, by the fence",
        tool="rake, watering can",
        activity="pulling weeds, planting seeds, digging the soil",
        adj="green, fresh, healthy, wild",
    ),
    _topic(
        "pets",
        "home",
        agent="pet owner, vet, breeder",
        thing="dog, cat, rabbit, puppy, parrot, pony",
        plural="collars, paws, tails, treats",
        verb="call/called, pet/petted, train/trained, find/found",
        did="ran in circles, barked at night, slept all day",
        place="under the sofa, in the basket, in the pet shop",
        tool="leash, food bowl",
        activity="walking the dog, feeding the cat, playing fetch",
        adj="friendly, playful, furry, shy",
    ),
    _topic(
        "oceans",
        "nature",
        agent="diver, fisherman, surfer",
        thing="whale, reef, dolphin, shark, tide, octopus",
        plural="corals, shells, waves, crabs",
        verb="film/filmed, follow/followed, study/studied, track/tracked",
        did="rose from the deep, swam with the fish, moved with the current",
        place="along the beach, under the waves, off the coast",
        tool="diving mask, water camera",
        activity="collecting shells, watching the tide, tagging sharks",
        adj="deep, blue, coastal, enormous",
    ),
    _topic(
        "forests",
        "nature",
        agent="forester, hunter, woodcutter",
        thing="oak, pine, fern, tree trunk, deer, fox",
        plural="branches, acorns, berries, trails",
        verb="see/saw, pass/passed, mark/marked, approach/approached",
        did="moved in the wind, stood in the shade, grew moss",
        place="in the forest, under the trees, deep in the woods",
        tool="hand axe, trail map",
        activity="picking berries, following deer, gathering wood",
        adj="tall, shady, quiet, wooden",
    ),
    _topic(
        "astronomy",
        "science",
        agent="stargazer, physicist, space scientist",
        thing="star, planet, moon, comet, meteor, nebula",
        plural="orbits, rings, satellites, black holes",
        verb="view/viewed, discover/discovered, detect/detected, predict/predicted",
        did="moved around the sun, crossed the sky, shone at night",
        place="in outer space, in the night sky, near the sun",
        tool="telescope, star chart",
        activity="watching the stars, tracking comets, studying light",
        adj="distant, faint, round, starry",
    ),
    _topic(
        "chemistry",
        "science",
        agent="chemist, researcher, lab student",
        thing="acid, metal, solution, reaction, powder, compound",
        plural="atoms, molecules, elements, samples",
        verb="test/tested, mix/mixed, weigh/weighed, filter/filtered",
        did="turned blue, gave off heat, changed its state",
        place="in the laboratory, on the lab bench, in the glass tube",
        tool="test tube, gas burner",
        activity="mixing acids, heating metals, writing formulas",
        adj="pure, toxic, unstable, stable",
    ),
    _topic(
        "medicine",
        "science",
        agent="doctor, nurse, patient",
        thing="fever, wound, cough, bandage, treatment, disease",
        plural="pills, bones, symptoms, tests",
        verb="treat/treated, check/checked, record/recorded, discuss/discussed",
        did="got better, responded to care, needed more attention",
        place="in the hospital, in the ward, at the clinic",
        tool="thermometer, medical chart",
        activity="taking pills, cleaning a wound, giving a vaccine",
        adj="serious, painful, mild, medical",
    ),
    _topic(
        "computers",
        "science",
        agent="programmer, engineer, user",
        thing="program, server, screen, database, network, website",
        plural="files, errors, passwords, cables",
        verb="update/updated, install/installed, debug/debugged, connect/connected",
        did="loaded the data, stopped responding, ran too slowly",
        place="in the data center, in the cloud, on the network drive",
        tool="code editor, test script",
        activity="writing code, reading the logs, saving files",
        adj="digital, slow, secure, online",
    ),
    _topic(
        "music",
        "arts",
        agent="singer, drummer, composer",
        thing="song, piano, guitar, drum, violin, concert",
        plural="notes, chords, strings, songs",
        verb="play/played, hear/heard, practice/practiced, perform/performed",
        did="filled the hall, sounded very good, lost its tune",
        place="in the music room, at the festival, in the concert hall",
        tool="microphone, metronome",
        activity="writing songs, playing scales, singing in a choir",
        adj="loud, musical, gentle, catchy",
    ),
    _topic(
        "painting",
        "arts",
        agent="painter, artist, art student",
        thing="canvas, sketch, frame, mural, easel, watercolor",
        plural="brushes, colors, pigments, paintings",
        verb="paint/painted, draw/drew, frame/framed, sell/sold",
        did="caught the light, hung on the wall, showed a village",
        place="in the studio, at the gallery, in the museum",
        tool="paint brush, palette",
        activity="mixing colors, drawing faces, painting hills",
        adj="colorful, abstract, pale, golden",
    ),
    _topic(
        "theater",
        "arts",
        agent="actor, director, actress",
        thing="play, costume, script, drama, final scene, spotlight",
        plural="actors, scenes, lines, masks",
        verb="stage/staged, present/presented, review/reviewed, announce/announced",
        did="lasted three acts, moved the audience, closed after a week",
        place="on the stage, in the front row, at the theater",
        tool="prop sword, stage light",
        activity="learning lines, building the set, acting in a play",
        adj="dramatic, comic, tragic, lively",
    ),
    _topic(
        "poetry",
        "arts",
        agent="poet, reader, publisher",
        thing="poem, verse, sonnet, notebook, haiku, stanza",
        plural="words, metaphors, poems, syllables",
        verb="write/wrote, publish/published, enjoy/enjoyed, quote/quoted",
        did="spoke of love, filled one page, ended in silence",
        place="in the library, on the first page, in the book",
        tool="fountain pen, paper notebook",
        activity="writing verses, counting syllables, reading aloud",
        adj="lyrical, short, poetic, moving",
    ),
    _topic(
        "chess",
        "games",
        agent="chess player, grandmaster, opponent",
        thing="king, queen, bishop, rook, opening, endgame",
        plural="pawns, knights, moves, pieces",
        verb="attack/attacked, block/blocked, capture/captured, defend/defended",
        did="controlled the center, moved to the corner, left the board",
        place="on the chess table, at the tournament, in the chess club",
        tool="score sheet, chess book",
        activity="moving a pawn, studying openings, trading pieces",
        adj="tactical, defensive, strategic, strong",
    ),
    _topic(
        "football",
        "games",
        agent="striker, coach, referee",
        thing="ball, goal, match, penalty, free kick, final game",
        plural="fans, players, teams, boots",
        verb="win/won, lose/lost, watch/watched, miss/missed",
        did="hit the post, went into the net, ended in a draw",
        place="on the pitch, in the stadium, at the training ground",
        tool="whistle, team flag",
        activity="scoring a goal, passing the ball, running with the team",
        adj="fast, exciting, physical, tough",
    ),
    _topic(
        "swimming",
        "games",
        agent="pool guard, swimmer, swim teacher",
        thing="pool, backstroke, diving board, lane, swim race, towel",
        plural="laps, medals, swimmers, games",
        verb="use/used, time/timed, prepare/prepared, demonstrate/demonstrated",
        did="was full of water, set a new record, began with a jump",
        place="in the pool, at the deep end, in the water",
        tool="kickboard, stopwatch",
        activity="swimming laps, holding your breath, jumping in",
        adj="wet, watery, tiring, competitive",
    ),
    _topic(
        "sailing",
        "travel",
        agent="sailor, captain, navigator",
        thing="boat, sail, anchor, ship, mast, deck",
        plural="knots, sails, boats, ropes",
        verb="raise/raised, lower/lowered, secure/secured, tie/tied",
        did="returned to port, turned to the north, left the bay",
        place="at the dock, out at sea, in the harbor",
        tool="compass, sea chart",
        activity="raising the sails, crossing the bay, tying knots",
        adj="steady, seaworthy, windy, heavy",
    ),
    _topic(
        "trains",
        "travel",
        agent="train driver, conductor, passenger",
        thing="train, railway, engine, ticket office, express, subway",
        plural="tracks, rails, stations, signals",
        verb="board/boarded, stop/stopped, delay/delayed, catch/caught",
        did="left the station, arrived on time, crossed the bridge",
        place="at the station, on the platform, along the track",
        tool="ticket machine, travel pass",
        activity="waiting for a train, buying a ticket, taking the express",
        adj="late, crowded, electric, modern",
    ),
    _topic(
        "hiking",
        "travel",
        agent="hiker, camper, backpacker",
        thing="trail, tent, backpack, mountain, campfire, valley",
        plural="socks, campsites, maps, hills",
        verb="carry/carried, reach/reached, cross/crossed, leave/left",
        did="led to the top, kept us warm, looked very steep",
        place="on the trail, at the camp, up the hill",
        tool="trail lamp, pocket map",
        activity="packing a bag, walking the trail, making camp",
        adj="scenic, rough, peaceful, narrow",
    ),
    _topic(
        "flying",
        "travel",
        agent="airman, pilot, flight crew",
        thing="plane, runway, wing, jet, flight, propeller",
        plural="clouds, airports, planes, seats",
        verb="land/landed, control/controlled, guide/guided, turn/turned",
        did="took off, landed on time, left the ground",
        place="at the airport, in the air, on the runway",
        tool="flight plan, radio",
        activity="landing a plane, flying at night, checking the fuel",
        adj="bumpy, direct, supersonic, high",
    ),
    _topic(
        "farming",
        "work",
        agent="farmer, farm worker, farm hand",
        thing="cow, tractor, harvest, sheep, horse, pig",
        plural="crops, cows, hens, fields",
        verb="tend/tended, buy/bought, grow/grew, own/owned",
        did="needed more hay, stood in the field, came in early",
        place="on the farm, across the field, at the market",
        tool="plow, milk can",
        activity="milking cows, driving a tractor, planting corn",
        adj="fertile, ripe, fat, rural",
    ),
    _topic(
        "banking",
        "work",
        agent="banker, customer, investor",
        thing="loan, bank account, payment, credit card, budget, check",
        plural="coins, taxes, fees, dollars",
        verb="approve/approved, pay/paid, transfer/transferred, close/closed",
        did="earned interest, cost too much, was paid in full",
        place="at the bank, in the vault, at the counter",
        tool="calculator, bank card",
        activity="saving money, counting coins, paying a bill",
        adj="expensive, financial, safe, private",
    ),
    _topic(
        "law",
        "work",
        agent="judge, lawyer, witness",
        thing="case, court, contract, trial, law book, sentence",
        plural="rights, laws, facts, crimes",
        verb="argue/argued, accept/accepted, explain/explained, consider/considered",
        did="changed the law, lasted for months, went to the jury",
        place="in the courtroom, before the judge, in the law office",
        tool="court order, legal file",
        activity="signing a contract, writing a law, defending a client",
        adj="legal, binding, fair, lawful",
    ),
    _topic(
        "building",
        "work",
        agent="builder, carpenter, plumber",
        thing="house, roof, brick wall, door, bridge, tower",
        plural="bricks, nails, walls, tiles",
        verb="build/built, finish/finished, support/supported, design/designed",
        did="needed new paint, fell down, stood for years",
        place="at the building site, in the basement, on the ground floor",
        tool="hammer, saw",
        activity="laying bricks, cutting boards, mixing concrete",
        adj="solid, square, brick, level",
    ),
)

# Group name of the topics -> what it is called in a label.
TOPIC_GROUPS: dict[str, str] = {
    "home": "home and household",
    "nature": "nature",
    "science": "science and technology",
    "arts": "arts and culture",
    "games": "sports and games",
    "travel": "travel and transport",
    "work": "work and trade",
}


@dataclass(frozen=True)
class Tone:
    """One tone: the adjective in every sentence says which it is; openers, closers and the end mark agree with it."""

    name: str
    slots: dict[str, tuple[str, ...]]
    end: str


def _tone(name: str, end: str, **slots: tuple[str, ...]) -> Tone:
    return Tone(name, slots, end)


TONES: tuple[Tone, ...] = (
    _tone(
        "plain",
        ".",
        tadj=("small", "large", "new", "common", "simple", "normal"),
        opener=("Today,", "Most of the time,", "In this town,", "On most days,"),
        closer=(),
    ),
    _tone(
        "cheerful",
        "!",
        tadj=("beautiful", "great", "special", "perfect", "lovely", "nice"),
        opener=("Happily,", "What a joy,", "To everyone's delight,", "Good news,", "How nice,"),
        closer=(", and everyone smiled", ", and we all laughed", ", which was great fun", ", and life felt good"),
    ),
    _tone(
        "formal",
        ".",
        tadj=("standard", "proper", "required", "regular", "primary", "registered"),
        opener=(
            "It is noted that",
            "According to the report,",
            "It has been confirmed that",
            "For the record,",
            "As a general rule,",
        ),
        closer=(", as stated in the report", ", as the rules require", ", subject to review", ", in line with policy"),
    ),
    _tone(
        "gloomy",
        ".",
        tadj=("sad", "dark", "poor", "bad", "lost", "cold"),
        opener=("Sadly,", "Once again,", "As we feared,", "To our sorrow,", "On another long day,"),
        closer=(", and nobody cared", ", and all hope was gone", ", but it was too late", ", and we felt alone"),
    ),
)

SHARED: dict[str, tuple[str, ...]] = {
    "number": _words("two, three, four, five, six, seven, ten, twenty"),
    "time": _words("at dawn, at noon, in the evening, at midnight, after lunch"),
    "season": _words("in spring, in summer, in autumn, in winter"),
    "weather": _words("the rain fell, the sun was shining, the wind was strong, snow covered the ground, fog came in"),
    "first": _words("Anna, Tom, Peter, Lucy, David, Emma, Jack, Maria, Paul, Sarah"),
}


# The fictional people; no first or last name occurs twice.
PEOPLE_NAMES: tuple[str, ...] = _words(
    "Mara Ellison, Oscar Finch, Nina Marsh, Victor Hale, Clara West, Simon Park, Julia Stone, Martin Reed, Diana "
    "Wells, Leo Grant, Alice Brook, Frank Carter, Helen Price, Oliver Banks, Rosa Miles, Henry Cole, Sandra "
    "Field, Walter King, Irene Porter, George Lane, Lena Foster, Max Turner, Vera Hunt, Edward Sharp, Linda "
    "Cross, Arthur Bell, Grace Mason, Philip Day, Monica Ward, Carl Winter, Eva Gordon, Bruce Law, Tina Rivers, "
    "Adam Chase, Laura Knight, Roger Hill, Silvia Page, Norman Fox, Gloria Best, Ivan Moss"
)

UNSAFE_DEEDS: tuple[str, ...] = _words(
    "break into a house, steal a car, forge a passport, copy a bank card, open a locked safe, cheat in an exam, "
    "read private messages, fake a signature, spread a false rumor, hide stolen goods, crack a password, trick a "
    "customer, poison a well, start a fire, avoid paying tax, rob a shop, sell fake tickets, follow a stranger "
    "home, damage a bridge, write a computer virus"
)
