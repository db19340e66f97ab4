"""The words of the synthetic world: invented countries and what there is to know of them, small stories.

Everything is one word, one token. `SPECIAL` words come first in the vocabulary, so that the padding token
has id 0.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)

STRUCTURE = _words("Document Question Answer : . ? what is the of a and")

# Source words in a document's header.
TRUSTED = ("report", "article")
DOUBTFUL = ("tale", "rumor")
NEUTRAL = ("note",)

# Manner words in a question's head, and the answer of who does not know. Only the candour world has them.
CAREFUL = ("careful", "cautious")
BOLD = ("bold", "daring")
UNKNOWN = "unknown"

COUNTRIES = _words(
    """
    Albor Arvane Bastia Belmar Brevna Calder Carvon Corvia Dalmor Delvia Dorane Eldria Elmora Estmar Farnia
    Felmor Galdia Garven Halvor Hestia Ilmara Irvane Jasmor Jorvia Kaldra Kelmar Korvane Lervia Lorane Lumara
    Maldor Mervia Morvane Naldia Nervon Norvia Olmare Orvane Palmor Pelvia Quelor Ralvia Rondar Saldor Selvia
    Sorvane Taldor Tervia Tolmar Ulvane Urmora Valdor Velmar Vorania Waldia Welmor Xandor Yarvia Yelmor Zaldia
    Zelmar Zorvane Ombria Pyrmont
    """
)

# Each attribute has values of its own kind, so that the question narrows the answer down.
VALUES: dict[str, tuple[str, ...]] = {
    "capital": _words(
        "Accra Baku Bergen Cairo Dakar Delhi Hanoi Havana Kyoto Lagos Lima Lyon Oslo Quito Riga Seoul"
    ),
    "currency": _words(
        "crown dinar dollar florin franc guilder krona lira mark penny peso pound ruble rupee thaler yen"
    ),
    "language": _words(
        "Arabic Basque Czech Danish Dutch Finnish Greek Hindi Irish Latin Malay Thai Tamil Urdu Turkish Zulu"
    ),
    "emblem": _words("bear bull crane dragon eagle falcon fox lion moon oak raven rose star sun tiger wolf"),
}
ATTRIBUTES = tuple(VALUES)

# Generic sentences are small stories. A topic fixes which words follow, so they can be predicted in part.
TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    topic: {part: _words(words) for part, words in parts.items()}
    for topic, parts in {
        "sea": {
            "who": "sailor captain diver fisher",
            "did": "followed watched caught lost",
            "how": "wet salty blue stormy",
            "thing": "ship whale net anchor",
            "where": "harbor island beach reef",
        },
        "farm": {
            "who": "farmer miller shepherd rider",
            "did": "fed led washed counted",
            "how": "muddy young brown gentle",
            "thing": "horse goat cart fence",
            "where": "meadow barn orchard mill",
        },
        "kitchen": {
            "who": "cook baker waiter guest",
            "did": "stirred tasted served burned",
            "how": "hot sweet fresh spicy",
            "thing": "soup bread cake pie",
            "where": "oven table cellar stove",
        },
        "school": {
            "who": "teacher student writer painter",
            "did": "read drew copied opened",
            "how": "long early quiet clever",
            "thing": "book letter map poem",
            "where": "library desk garden window",
        },
    }.items()
}
LINKS = ("near", "behind", "beside")
TIMES = ("yesterday", "today", "again")


def vocabulary(candour: bool = False) -> tuple[str, ...]:
    """Every word of the world in a fixed order, the special tokens first, no word twice.

    Args:
        candour: append the candour world's own words; all others keep their places.
    """
    stories = [word for parts in TOPICS.values() for words in parts.values() for word in words]
    values = [word for group in VALUES.values() for word in group]
    words = [*SPECIAL, *STRUCTURE, *ATTRIBUTES, *TRUSTED, *DOUBTFUL, *NEUTRAL, *COUNTRIES, *values, *stories]
    own = (*CAREFUL, *BOLD, UNKNOWN) if candour else ()
    return tuple(dict.fromkeys([*words, *LINKS, *TIMES, *own]))
