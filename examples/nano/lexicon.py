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
        agent="cook, chef, waiter, baker",
        thing="soup, sauce, stew, dish, meal, pie, salad, bread",
        plural="onions, carrots, potatoes, eggs, beans",
        verb="taste/tasted, serve/served, heat/heated, season/seasoned, share/shared",
        did="cooled on the table, smelled of garlic, boiled too fast, went cold",
        place="in the kitchen, on the stove, beside the oven, in the restaurant",
        tool="wooden spoon, kitchen knife, copper pan",
        activity="chopping onions, setting the table, boiling rice, making dinner",
        adj="salty, spicy, tender, sweet, hot",
    ),
    _topic(
        "gardening",
        "home",
        agent="gardener, florist, neighbor, planter",
        thing="rose, hedge, lawn, flower bed, vine, apple tree, compost, tulip",
        plural="seeds, weeds, roots, leaves, herbs",
        verb="water/watered, trim/trimmed, plant/planted, move/moved, feed/fed",
        did="grew along the path, opened its petals, dried in the sun, lost its color",
        place="in the garden, near the greenhouse, behind the shed, by the fence",
        tool="rake, garden hose, watering can",
        activity="pulling weeds, planting seeds, digging the soil, cutting the grass",
        adj="green, fresh, healthy, wild, leafy",
    ),
    _topic(
        "sewing",
        "home",
        agent="tailor, dressmaker, weaver, designer",
        thing="dress, coat, shirt, curtain, jacket, skirt, scarf, quilt",
        plural="buttons, sleeves, threads, pockets, ribbons",
        verb="fold/folded, stitch/stitched, measure/measured, press/pressed, mend/mended",
        did="hung on a hook, came apart, fitted very well, lost a button",
        place="in the workshop, at the sewing table, next to the mirror, in the clothing shop",
        tool="sewing needle, silk thread, tape measure",
        activity="threading a needle, cutting cloth, choosing fabric, knitting wool",
        adj="soft, loose, tight, cotton, stylish",
    ),
    _topic(
        "pets",
        "home",
        agent="pet owner, vet, dog trainer, breeder",
        thing="dog, cat, rabbit, puppy, kitten, parrot, hamster, pony",
        plural="collars, paws, whiskers, tails, treats",
        verb="pet/petted, brush/brushed, wash/washed, train/trained, call/called",
        did="slept on the sofa, barked at the door, ate from a bowl, ran in circles",
        place="in the basket, under the sofa, at the animal doctor, in the pet shop",
        tool="leash, food bowl, rubber ball",
        activity="walking the dog, feeding the cat, cleaning the cage, playing fetch",
        adj="friendly, playful, furry, shy, hungry",
    ),
    _topic(
        "oceans",
        "nature",
        agent="diver, marine biologist, fisherman, surfer",
        thing="whale, reef, dolphin, shark, tide, octopus, sea turtle, jellyfish",
        plural="corals, shells, waves, crabs, currents",
        verb="film/filmed, follow/followed, study/studied, track/tracked, observe/observed",
        did="rose from the deep, swam with the fish, rolled toward the beach, sank below the surface",
        place="in the ocean, along the beach, under the waves, off the coast",
        tool="diving mask, fishing net, water camera",
        activity="diving in salt water, collecting shells, watching the tide, tagging sharks",
        adj="deep, blue, slippery, coastal, enormous",
    ),
    _topic(
        "birds",
        "nature",
        agent="bird watcher, ranger, zoo keeper, falconer",
        thing="owl, eagle, sparrow, nest, swan, robin, hawk, crow",
        plural="feathers, wings, chicks, geese, ducks",
        verb="spot/spotted, protect/protected, photograph/photographed, admire/admired, count/counted",
        did="sang from a branch, flew over the lake, landed on the roof, called across the valley",
        place="in the nest box, over the marsh, in the wetland, above the treetops",
        tool="bird feeder, pair of binoculars, bird call",
        activity="watching owls, building a bird house, naming birds, hearing birdsong",
        adj="noisy, feathered, graceful, swift, alert",
    ),
    _topic(
        "forests",
        "nature",
        agent="forester, hunter, woodcutter, tree climber",
        thing="oak, pine, fern, tree trunk, deer, fox, mushroom, fallen log",
        plural="branches, acorns, berries, trails, squirrels",
        verb="find/found, pass/passed, mark/marked, approach/approached, notice/noticed",
        did="stood in the shade, moved in the wind, hid among the trees, was covered with moss",
        place="in the forest, under the trees, deep in the woods, at the forest edge",
        tool="hand axe, trail map, walking stick",
        activity="picking berries, climbing trees, following deer, gathering wood",
        adj="tall, mossy, shady, quiet, wooden",
    ),
    _topic(
        "volcanoes",
        "nature",
        agent="geologist, mountain guide, volcano expert, rock collector",
        thing="volcano, crater, lava flow, ash cloud, peak, hot spring, cone, steam vent",
        plural="rocks, ashes, cracks, gases, tremors",
        verb="examine/examined, map/mapped, monitor/monitored, survey/surveyed, sample/sampled",
        did="burst into flames, shook the ground, turned into stone, smoked for weeks",
        place="near the crater, on the slope, below the summit, in the lava field",
        tool="gas mask, rock pick, heat sensor",
        activity="measuring lava, climbing the slope, testing hot rock, recording tremors",
        adj="active, molten, rocky, explosive, smoky",
    ),
    _topic(
        "astronomy",
        "science",
        agent="astronomer, stargazer, physicist, space scientist",
        thing="star, planet, moon, comet, galaxy, meteor, nebula, eclipse",
        plural="orbits, rings, satellites, asteroids, black holes",
        verb="view/viewed, discover/discovered, chart/charted, detect/detected, predict/predicted",
        did="crossed the sky, faded into space, shone above the hills, moved around the sun",
        place="in the night sky, at the observatory, beyond the solar system, in outer space",
        tool="telescope, star chart, space probe",
        activity="watching the stars, tracking comets, mapping the moon, studying light",
        adj="distant, cosmic, faint, round, starry",
    ),
    _topic(
        "chemistry",
        "science",
        agent="chemist, lab assistant, researcher, lab student",
        thing="acid, liquid, metal, salt crystal, solution, reaction, powder, compound",
        plural="atoms, molecules, bubbles, elements, samples",
        verb="test/tested, mix/mixed, weigh/weighed, filter/filtered, dilute/diluted",
        did="turned blue, gave off heat, formed a crystal, changed its state",
        place="in the laboratory, in the glass tube, under the fume hood, on the lab bench",
        tool="test tube, gas burner, glass flask",
        activity="mixing acids, heating metals, weighing powder, writing formulas",
        adj="pure, toxic, unstable, soluble, stable",
    ),
    _topic(
        "medicine",
        "science",
        agent="doctor, nurse, surgeon, patient",
        thing="fever, wound, medicine bottle, vaccine, cough, bandage, treatment, disease",
        plural="pills, bones, symptoms, muscles, tests",
        verb="treat/treated, check/checked, record/recorded, diagnose/diagnosed, discuss/discussed",
        did="got better, responded to care, caused some pain, needed more attention",
        place="in the hospital, at the clinic, in the waiting room, in the ward",
        tool="thermometer, stethoscope, medical chart",
        activity="taking pills, cleaning a wound, giving a vaccine, reading an x-ray",
        adj="serious, painful, mild, medical, chronic",
    ),
    _topic(
        "computers",
        "science",
        agent="programmer, engineer, hacker, user",
        thing="program, keyboard, server, screen, laptop, database, network, website",
        plural="files, errors, passwords, cables, updates",
        verb="update/updated, install/installed, debug/debugged, restart/restarted, connect/connected",
        did="crashed without warning, loaded the data, ran in the background, stopped responding",
        place="in the data center, on the desktop, in the cloud, on the network drive",
        tool="code editor, backup drive, test script",
        activity="writing code, fixing bugs, reading the logs, saving files",
        adj="digital, slow, secure, remote, online",
    ),
    _topic(
        "music",
        "arts",
        agent="singer, drummer, composer, pianist",
        thing="song, piano, guitar, melody, drum, violin, concert, trumpet",
        plural="notes, chords, strings, songs, bands",
        verb="play/played, hear/heard, practice/practiced, tune/tuned, perform/performed",
        did="filled the hall, sounded out of tune, echoed through the room, ended on a high note",
        place="in the concert hall, in front of the orchestra, in the music room, at the festival",
        tool="microphone, drum stick, metronome",
        activity="playing scales, singing in a choir, writing songs, tuning a guitar",
        adj="loud, musical, rhythmic, gentle, catchy",
    ),
    _topic(
        "painting",
        "arts",
        agent="painter, artist, art dealer, art student",
        thing="portrait, canvas, landscape, sketch, frame, mural, easel, watercolor",
        plural="brushes, colors, pigments, shadows, paintings",
        verb="paint/painted, draw/drew, frame/framed, sell/sold, display/displayed",
        did="hung on the wall, dried by the window, caught the light, showed a small village",
        place="in the studio, at the gallery, in the art museum, beside the easel stand",
        tool="paint brush, palette, charcoal pencil",
        activity="mixing colors, drawing faces, cleaning brushes, painting hills",
        adj="colorful, abstract, pale, vivid, golden",
    ),
    _topic(
        "theater",
        "arts",
        agent="actor, director, actress, stage manager",
        thing="play, costume, script, drama, comedy, final scene, rehearsal, spotlight",
        plural="actors, tickets, scenes, lines, masks",
        verb="rehearse/rehearsed, stage/staged, present/presented, review/reviewed, announce/announced",
        did="opened to applause, lasted three acts, moved the audience, closed after a week",
        place="on the stage, behind the curtain, in the front row, at the theater",
        tool="prop sword, stage light, makeup box",
        activity="learning lines, building the set, acting in a play, selling tickets",
        adj="dramatic, comic, tragic, lively, theatrical",
    ),
    _topic(
        "poetry",
        "arts",
        agent="poet, reader, publisher, literary critic",
        thing="poem, verse, rhyme, sonnet, notebook, ballad, haiku, stanza",
        plural="words, rhymes, metaphors, poems, syllables",
        verb="enjoy/enjoyed, recite/recited, write/wrote, publish/published, quote/quoted",
        did="spoke of love, rhymed with spring, filled one page, ended in silence",
        place="in the library, on the first page, at the poetry reading, in the book",
        tool="fountain pen, rhyming dictionary, paper notebook",
        activity="writing verses, counting syllables, reading aloud, finding a rhyme",
        adj="lyrical, romantic, short, poetic, moving",
    ),
    _topic(
        "chess",
        "games",
        agent="chess player, grandmaster, opponent, champion",
        thing="king, queen, bishop, rook, opening, endgame, chess board, gambit",
        plural="pawns, knights, moves, squares, pieces",
        verb="attack/attacked, capture/captured, defend/defended, sacrifice/sacrificed, block/blocked",
        did="moved to the corner, controlled the center, fell to a pawn, escaped from check",
        place="on the chess table, in the center of the board, at the tournament, in the chess club",
        tool="chess clock, score sheet, chess book",
        activity="planning a checkmate, moving a pawn, studying openings, trading pieces",
        adj="tactical, defensive, clever, strategic, strong",
    ),
    _topic(
        "football",
        "games",
        agent="striker, goalkeeper, coach, referee",
        thing="ball, goal, match, penalty, corner kick, trophy, free kick, final game",
        plural="fans, players, teams, fouls, boots",
        verb="kick/kicked, win/won, lose/lost, watch/watched, miss/missed",
        did="hit the post, went into the net, ended in a draw, rolled over the line",
        place="on the pitch, in the stadium, in front of the goal, at the training ground",
        tool="football boot, whistle, team flag",
        activity="scoring a goal, passing the ball, kicking a penalty, running with the team",
        adj="fast, unfair, exciting, physical, tough",
    ),
    _topic(
        "swimming",
        "games",
        agent="swimmer, lifeguard, pool guard, relay racer",
        thing="pool, backstroke, diving board, lane, butterfly stroke, swim race, towel, swim cap",
        plural="goggles, laps, medals, swimmers, strokes",
        verb="use/used, time/timed, prepare/prepared, demonstrate/demonstrated, repeat/repeated",
        did="ended at the wall, was full of water, set a new record, began with a jump",
        place="in the pool, at the deep end, in the locker room, at the water's edge",
        tool="kickboard, stopwatch, pair of goggles",
        activity="swimming laps, holding your breath, kicking in the water, diving for coins",
        adj="wet, watery, tiring, refreshing, competitive",
    ),
    _topic(
        "cycling",
        "games",
        agent="cyclist, bike mechanic, rider, bike racer",
        thing="bicycle, wheel, helmet, bike chain, saddle, brake, tire, road race",
        plural="pedals, gears, bikes, riders, spokes",
        verb="repair/repaired, ride/rode, clean/cleaned, lift/lifted, adjust/adjusted",
        did="turned without a sound, needed more air, rolled down the hill, broke on the road",
        place="on the bike path, in the bike shop, on the steep climb, along the road",
        tool="bike pump, bike lock, spare tire",
        activity="riding uphill, changing a tire, pumping air, racing on the road",
        adj="light, rusty, smooth, steep, shiny",
    ),
    _topic(
        "sailing",
        "travel",
        agent="sailor, captain, navigator, first mate",
        thing="boat, sail, anchor, ship, mast, rudder, yacht, deck",
        plural="ropes, knots, harbors, sails, boats",
        verb="steer/steered, raise/raised, lower/lowered, secure/secured, tie/tied",
        did="drifted out to sea, leaned in the wind, returned to port, turned to the north",
        place="in the harbor, on the deck of the boat, at the dock, out at sea",
        tool="compass, sea chart, length of rope",
        activity="raising the sails, crossing the bay, tying knots, steering a boat",
        adj="steady, wind-blown, seaworthy, windy, heavy",
    ),
    _topic(
        "trains",
        "travel",
        agent="train driver, conductor, passenger, station master",
        thing="train, railway, engine, ticket office, express, tunnel, locomotive, subway",
        plural="tracks, carriages, rails, stations, signals",
        verb="board/boarded, stop/stopped, inspect/inspected, delay/delayed, catch/caught",
        did="left the station, arrived on time, crossed the bridge, waited at the signal",
        place="at the station, on the platform, in the dining car, along the track",
        tool="ticket machine, signal lamp, travel pass",
        activity="waiting for a train, buying a ticket, loading the carriages, taking the express",
        adj="late, crowded, punctual, electric, modern",
    ),
    _topic(
        "hiking",
        "travel",
        agent="hiker, trail guide, camper, backpacker",
        thing="trail, tent, backpack, mountain, campfire, valley, hill path, sleeping bag",
        plural="socks, campsites, maps, hills, blankets",
        verb="carry/carried, reach/reached, cross/crossed, leave/left, explore/explored",
        did="led to the top, kept us warm, looked very steep, stood by the river",
        place="on the trail, at the campsite, on top of the hill, beside the river",
        tool="trail lamp, pocket map, hiking pole",
        activity="climbing a mountain, packing a bag, walking the trail, sleeping in a tent",
        adj="muddy, scenic, rough, peaceful, narrow",
    ),
    _topic(
        "flying",
        "travel",
        agent="pilot, flight attendant, air traffic controller, airman",
        thing="plane, runway, wing, jet, cockpit, flight, helicopter, propeller",
        plural="clouds, airports, planes, seats, pilots",
        verb="land/landed, control/controlled, fuel/fueled, guide/guided, turn/turned",
        did="took off, flew through the clouds, landed on time, climbed into the sky",
        place="at the airport, in the air, in the control tower, on the runway",
        tool="flight plan, radio, seat belt",
        activity="landing a plane, flying at night, checking the fuel, boarding a flight",
        adj="airborne, bumpy, direct, supersonic, high",
    ),
    _topic(
        "farming",
        "work",
        agent="farmer, farm worker, shepherd, milk producer",
        thing="cow, tractor, hay barn, harvest, wheat field, sheep, horse, pig",
        plural="crops, cows, chickens, hens, fields",
        verb="tend/tended, gather/gathered, buy/bought, grow/grew, own/owned",
        did="stood in the field, fed the whole village, came in from the rain, needed more hay",
        place="on the farm, in the barn, across the field, at the market",
        tool="plow, pitchfork, milk bucket",
        activity="milking cows, driving a tractor, planting corn, feeding chickens",
        adj="fertile, ripe, fat, rural, dusty",
    ),
    _topic(
        "banking",
        "work",
        agent="banker, bank clerk, customer, investor",
        thing="loan, bank account, payment, credit card, budget, mortgage, check, debt",
        plural="coins, taxes, fees, dollars, savings",
        verb="approve/approved, pay/paid, transfer/transferred, manage/managed, close/closed",
        did="earned interest, cost too much, grew over the years, was paid in full",
        place="at the bank, in the vault, in the bank lobby, at the cash machine",
        tool="calculator, bank card, signed form",
        activity="saving money, counting coins, paying a bill, opening an account",
        adj="expensive, financial, safe, costly, private",
    ),
    _topic(
        "law",
        "work",
        agent="judge, lawyer, witness, police officer",
        thing="case, court, contract, verdict, trial, law book, sentence, appeal",
        plural="rights, laws, facts, crimes, documents",
        verb="argue/argued, accept/accepted, explain/explained, dismiss/dismissed, consider/considered",
        did="went to the jury, lasted for months, changed the law, was decided in court",
        place="in the courtroom, before the judge, in the law office, at the hearing",
        tool="court order, witness statement, legal file",
        activity="signing a contract, hearing a witness, writing a law, defending a client",
        adj="legal, guilty, binding, fair, lawful",
    ),
    _topic(
        "building",
        "work",
        agent="builder, carpenter, architect, plumber",
        thing="house, roof, brick wall, door, staircase, bridge, chimney, tower",
        plural="bricks, nails, walls, tiles, boards",
        verb="build/built, finish/finished, support/supported, fix/fixed, design/designed",
        did="stood for a century, needed new paint, leaked at the corner, fell down",
        place="at the building site, on the ladder, in the basement, on the ground floor",
        tool="hammer, saw, power drill",
        activity="laying bricks, cutting boards, mixing concrete, painting the walls",
        adj="solid, concrete, square, brick, level",
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
    "time": _words("before dawn, at noon, in the evening, at midnight, early in the morning, after lunch"),
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
