"""Words of everyday English captions, which the rules of `caption_facts` look up."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLORS = _words(
    "black white red blue green yellow brown orange pink purple gray grey tan beige golden gold "
    "silver blond blonde"
)
"""Words that name a color; `and` joins two of them."""
_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS, 1)}
ARTICLES = _words("a an another the this that his her its their some several many")
"""Words that open a noun phrase."""
SINGULAR = frozenset({"a", "an", "another", "one"})
ADJECTIVES = _words(
    "young old older little small big large tall long short huge tiny wet dirty muddy snowy "
    "grassy sandy rocky wooden colorful striped bright dark light furry fluffy elderly bald "
    "shirtless blurry steep shallow deep dry empty busy crowded plastic metal brick concrete "
    "stuffed smiling asian african american male female adult teenage professional inflatable "
    "giant open round beautiful happy lone haired colored painted plaid leather paved wooded "
    "green-haired"
)
"""Words that may come between what opens a noun phrase and its noun."""

_NOUNS = {
    "person": "man woman boy girl child person baby toddler kid lady guy player skateboarder "
    "snowboarder surfer skier biker cyclist rider climber hiker runner dancer bride "
    "people=person men=man women=woman children=child ladies=lady babies=baby",
    "animal": "dog cat horse cow sheep bird puppy elephant bear giraffe zebra greyhound poodle "
    "bull goat duck fish sheep=sheep puppies=puppy fish=fish",
    "vehicle": "bike bicycle car truck bus train boat motorcycle skateboard surfboard snowboard "
    "scooter kayak canoe raft sled airplane plane jeep cart buses=bus",
    "clothing": "shirt jacket hat dress helmet coat suit uniform sweater vest cap skirt scarf "
    "costume backpack collar bikini swimsuit wetsuit tie mask jersey dresses=dress scarves=scarf",
    "object": "ball stick frisbee toy rope umbrella bench table chair bed couch bag box book phone "
    "cellphone laptop computer guitar camera flag kite racket bat sign flower plate bowl cup "
    "bottle glass cake pizza sandwich tree rock log leash swing slide trampoline hurdle ramp "
    "toilet sink stove refrigerator oven mirror clock lamp microphone balloon tire bucket "
    "benches=bench boxes=box glasses=glasses couches=couch sunglasses=sunglasses goggles=goggles "
    "branches=branch branch",
    "place": "water grass snow field beach street pool park road hill mountain sand ocean lake "
    "river sidewalk path track room yard woods forest kitchen bathroom playground fountain stage "
    "court desert bridge trail shore floor building house stairs stadium backyard garden "
    "restaurant store stream pond creek mud dirt city cliff wall fence beaches=beach grass=grass",
}


def _read() -> dict[str, tuple[str, str, bool]]:
    found: dict[str, tuple[str, str, bool]] = {}
    irregular = set()
    for kind, words in _NOUNS.items():
        for word in words.split():
            plural, _, singular = word.partition("=")
            if singular:
                found[plural] = (singular, kind, plural != singular)
                irregular.add(singular)
            elif word not in found:
                found[word] = (word, kind, False)
    for word, (_, kind, is_plural) in list(found.items()):
        if not is_plural and word not in irregular:
            found[f"{word}s"] = (word, kind, True)
    return found


NOUNS = _read()
"""From a noun as written to its singular, its kind, and whether it is a plural."""
PLURALS = {singular: word for word, (singular, _, is_plural) in NOUNS.items() if is_plural}
MASSES = _words("water grass snow sand mud dirt")
"""Nouns that take no article."""
PAIRS = _words("stairs woods glasses sunglasses goggles")
"""Nouns that are plurals alone."""
UNCOUNTED = MASSES | PAIRS | _words("sheep fish")
"""Nouns that do not say by their form how many there are."""
NOT_VERBS = _words(
    "building something clothing railing ring string wedding evening morning ceiling king swing "
    "sling thing nothing anything everything during being going getting trying living bathing "
    "parking racing opposing interesting matching amusing outstanding wing rigging"
)
"""Words that end as a verb does and are none, or say nothing by themselves."""
PRESENT = {
    "runs": "running", "run": "running", "jumps": "jumping", "jump": "jumping",
    "stands": "standing", "stand": "standing", "sits": "sitting", "sit": "sitting",
    "plays": "playing", "play": "playing", "walks": "walking", "walk": "walking",
    "rides": "riding", "ride": "riding", "holds": "holding", "looks": "looking",
    "climbs": "climbing", "smiles": "smiling", "carries": "carrying", "catches": "catching",
    "swims": "swimming", "chases": "chasing", "throws": "throwing", "eats": "eating",
    "leaps": "jumping", "wears": "wearing", "pulls": "pulling", "kicks": "kicking",
}  # fmt: skip
TAKES_OBJECT = _words(
    "playing riding holding catching throwing eating carrying wearing chasing pulling pushing "
    "kicking hitting drinking reading climbing petting hugging kissing feeding biting chewing "
    "licking swinging wearing driving"
)
"""Verbs whose object belongs to the answer of what somebody is doing."""
SPORTS = _words(
    "soccer football tennis basketball baseball hockey volleyball rugby softball cricket"
)
PREPOSITIONS = _words(
    "in on at through across over near into along by under behind down up around beside onto "
    "outside inside"
)
ACCOMPANIES = PREPOSITIONS | _words("with to for toward towards from against atop")
"""What may precede somebody who is not the one that acts; `a group of people` does."""

_ROLES = (
    "player skateboarder snowboarder surfer skier biker cyclist rider climber hiker runner dancer"
)
_RELATED = (
    f"person: man woman boy girl child baby toddler kid lady guy bride {_ROLES}",
    "man: guy boy", "woman: lady girl bride", "lady: girl bride", "guy: boy",
    "child: boy girl baby toddler kid", "kid: boy girl baby toddler",
    "toddler: boy girl baby", "baby: boy girl",
    *(
        f"{role}: man woman boy girl child kid lady guy bride {_ROLES}"
        for role in _ROLES.split()
    ),
    "dog: puppy greyhound poodle", "puppy: greyhound poodle", "greyhound: poodle", "cow: bull",
    "bird: duck", "sheep: goat",
    "bike: bicycle motorcycle scooter", "bicycle: scooter", "motorcycle: scooter",
    "car: jeep truck", "jeep: truck", "boat: kayak canoe raft", "kayak: canoe raft", "canoe: raft",
    "airplane: plane", "sled: snowboard", "skateboard: scooter",
    "shirt: jersey vest uniform sweater costume", "jacket: coat vest suit uniform sweater costume",
    "coat: suit uniform costume", "suit: uniform costume swimsuit wetsuit bikini tie",
    "uniform: costume jersey", "sweater: vest jersey", "vest: jersey", "dress: skirt costume suit",
    "hat: cap helmet costume", "cap: helmet", "bikini: swimsuit wetsuit", "swimsuit: wetsuit",
    "mask: goggles costume", "skirt: costume",
    "ball: toy balloon", "frisbee: toy", "stick: branch log bat toy", "branch: log tree",
    "log: tree", "rope: leash", "table: bench", "bench: chair couch", "chair: couch", "bed: couch",
    "bag: box backpack", "phone: cellphone", "laptop: computer", "plate: bowl", "bowl: cup",
    "cup: glass", "glass: bottle", "glasses: sunglasses goggles", "sunglasses: goggles",
    "racket: bat", "flag: kite sign", "ramp: slide hurdle", "clock: lamp", "tree: flower",
    "water: ocean lake river stream pond pool creek fountain beach shore",
    "ocean: lake river shore beach", "lake: river shore pond beach pool", "beach: sand shore",
    "river: stream creek shore", "stream: creek pond", "pond: creek pool", "desert: sand",
    "grass: field yard park garden backyard woods", "field: yard park court stadium track",
    "yard: backyard garden park playground", "park: playground garden woods trail",
    "street: road sidewalk city path bridge", "road: path track trail sidewalk dirt",
    "path: trail track sidewalk woods", "trail: track woods forest dirt", "woods: forest",
    "forest: tree", "woods: tree", "dirt: mud sand track", "hill: mountain cliff",
    "mountain: cliff", "building: house store restaurant room wall stairs",
    "house: room kitchen bathroom", "room: kitchen bathroom floor store restaurant",
    "wall: fence building", "court: stadium", "city: building", "snow: hill mountain",
)  # fmt: skip
"""Nouns that may mean the same thing, or of which one is seldom without the other."""


def _read_related() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for line in _RELATED:
        noun, _, others = line.partition(":")
        for other in others.split():
            found.setdefault(noun, set()).add(other)
            found.setdefault(other, set()).add(noun)
    return {noun: frozenset(others) for noun, others in found.items()}


RELATED = _read_related()
"""From a singular to those that a caption with it neither says nor denies."""
