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


MASSES = _words("water grass snow sand mud dirt")
"""Nouns that take no article."""
PAIRS = _words("stairs woods glasses sunglasses goggles")
"""Nouns that are plurals alone."""
UNCOUNTED = MASSES | PAIRS | _words("sheep fish")
"""Nouns that do not say by their form how many there are."""


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "sh", "ch", "x")) else f"{noun}s"


def _read() -> tuple[dict[str, tuple[str, str, bool]], dict[str, str]]:
    nouns: dict[str, tuple[str, str, bool]] = {}
    plurals = {}
    for kind, words in _NOUNS.items():
        for word in words.split():
            plural, _, singular = word.partition("=")
            if singular:
                is_plural = plural != singular or singular in PAIRS
                nouns[plural] = (singular, kind, is_plural)
                plurals[singular] = plural
            elif word not in nouns:
                nouns[word] = (word, kind, False)
    for word, (singular, kind, is_plural) in list(nouns.items()):
        if not is_plural and word not in plurals:
            plurals[word] = _plural(word)
            nouns.setdefault(plurals[word], (singular, kind, True))
    return nouns, plurals


NOUNS, PLURALS = _read()
"""From a noun as written to its singular, its kind, and whether it is a plural; and from a
singular to its plural."""
NOT_VERBS = _words(
    "building something clothing railing ring string wedding evening morning ceiling king swing "
    "sling thing nothing anything everything during being going getting trying living bathing "
    "parking racing opposing interesting matching amusing outstanding wing rigging"
)
"""Words that end as a verb does and are none, or say nothing by themselves."""
ING_FORMS = {
    form: verb
    for verb, forms in {
        "running": "run runs ran", "jumping": "jump jumps jumped leap leaps",
        "standing": "stand stands stood", "sitting": "sit sits sat", "playing": "play plays played",
        "walking": "walk walks walked", "riding": "ride rides rode", "holding": "hold holds",
        "looking": "looks", "climbing": "climb climbs climbed", "smiling": "smile smiles",
        "carrying": "carry carries", "catching": "catch catches", "swimming": "swim swims swam",
        "chasing": "chase chases", "throwing": "throw throws", "eating": "eat eats ate",
        "wearing": "wear wears", "pulling": "pull pulls", "kicking": "kick kicks",
        "sleeping": "sleep sleeps slept", "dancing": "dance dances danced", "lying": "lies lay",
    }.items()
    for form in forms.split()
}  # fmt: skip
"""From other forms of a verb to the one that ends in -ing."""
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
"""What may precede somebody who is not the one that acts."""
GROUPS = _words("group pair couple team herd pack crowd flock line bunch row number trio lot")
"""Before `of` they say how many act, others whose it is: `the back of a horse`."""

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
    "bike: biker cyclist rider", "bicycle: biker cyclist rider", "motorcycle: biker rider",
    "horse: rider", "skateboard: skateboarder", "snowboard: snowboarder", "surfboard: surfer",
    "rope: climber", "ball: player bat racket", "backpack: hiker", "dress: bride",
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


_IMPLIED = (
    "baseball softball cricket: bat ball", "tennis: racket ball court",
    "soccer football basketball volleyball rugby: ball", "hockey: stick",
    "skateboarding skateboards skateboard: skateboard skateboarder ramp",
    "surfing surfs surf: surfboard surfer ocean water beach",
    "snowboarding snowboards: snowboard snowboarder snow", "skiing skis ski: skier snow",
    "biking bikes cycling cycles pedaling pedals: bike bicycle cyclist biker rider",
    "kayaking: kayak water", "rafting: raft water", "sledding: sled snow", "boating: boat water",
    "sailing sails sailboat rowboat speedboat: boat water", "swimming swims swim: water pool",
    "driving drives: car truck", "reading reads: book", "photographing photo photograph: camera",
    "climbing climbs: rope rock cliff mountain wall", "hiking hikes: hiker trail path mountain",
    "kid kids family couple crowd group team band people: man woman boy girl child person",
)  # fmt: skip


def _read_implied() -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for line in _IMPLIED:
        words, _, nouns = line.partition(":")
        found |= dict.fromkeys(words.split(), _words(nouns))
    return found


IMPLIED = _read_implied()
"""From words, verbs and sports above all, to things that need not be named as well."""


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
