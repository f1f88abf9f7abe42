"""Generated facts to answer questions from: the world of the embedded model `facts-llama`.

Every document tells about one museum, shop, town, company or library; names and values are drawn at
random, so an answer can only be looked up in the prompt. Prompts share two levels of prefix: the
instructions, then the instructions and the documents.

    rng = random.Random(1)
    for prompt, answer in batch(rng, documents=8, questions=4):
        ...
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

INSTRUCTIONS = """\
You work at the information desk of a small country. The notes below describe its museums, \
shops, towns, companies and libraries. Each note is about one place, and a sentence that says \
"it" speaks of the place its note began with. Visitors ask one question at a time. Find the note \
that holds the answer and reply with the words of the note alone: a name, an address, a time, a \
price, a room, a day or a number. Do not add anything else."""


class Fact(NamedTuple):
    """A question and the answer that its document states, word for word."""

    question: str
    answer: str


class Document(NamedTuple):
    """A few sentences about `subject`, and every fact that can be asked about them."""

    subject: str
    text: str
    facts: tuple[Fact, ...]


def document(
    rng: random.Random,
    taken: set[str] | None = None,
    forms: Sequence[tuple[str, _Kind]] | None = None,
) -> Document:
    """Draw a document. Names in `taken` are avoided, and those used are added to it."""
    draw = _Draw(rng, set() if taken is None else taken)
    form, kind = rng.choice(forms or _FORMS)
    subject = form.format(draw.name())
    topics = rng.sample(kind.topics, rng.randint(3, len(kind.topics)))
    sentences, facts = [], []
    for topic in [kind.opening, *topics]:
        values = {slot: getattr(draw, value)() for slot, value in topic.slots.items()}
        words = values | _named(subject)
        sentence = rng.choice(topic.sentences).format(**words)
        sentences.append(sentence[0].upper() + sentence[1:])
        for slot, questions in topic.questions.items():
            question = rng.choice(questions).format(**values, **_named(subject))
            facts.append(Fact(question, values[slot]))
    return Document(subject, " ".join(sentences), tuple(facts))


def documents(rng: random.Random, count: int) -> list[Document]:
    """Draw `count` documents in which no name occurs twice, so that no question is ambiguous.

    They are of one form, such as museums only, or of several: often names alone tell them apart.
    """
    if not 1 <= count <= 64:
        raise ValueError(f"count is {count}; between 1 and 64 documents can be drawn together")
    forms = rng.sample(_FORMS, rng.choice((1, 2, 4, len(_FORMS))))
    taken: set[str] = set()
    return [document(rng, taken, forms) for _ in range(count)]


def context(documents: Sequence[Document]) -> str:
    """The part of a prompt that all questions about `documents` share."""
    return "\n\n".join([INSTRUCTIONS, *(d.text for d in documents)]) + "\n\n"


def ask(question: str) -> str:
    """The part of a prompt that is one question's own."""
    return f"Question: {question}\nAnswer:"


def prompt(documents: Sequence[Document], question: str) -> str:
    """The whole prompt: instructions, documents, question. The model goes on with the answer."""
    return context(documents) + ask(question)


def batch(
    rng: random.Random, documents: int = 8, questions: int = 8, contexts: int = 1
) -> list[tuple[str, str]]:
    """Draw `contexts` * `questions` pairs of prompt and answer, one context's after another's.

    All prompts begin with INSTRUCTIONS; the `questions` prompts of a context also share their
    `documents` documents, and ask for different facts.
    """
    pairs = []
    for _ in range(contexts):
        drawn = _draw_documents(rng, documents)
        facts = [fact for d in drawn for fact in d.facts]
        if not 1 <= questions <= len(facts):
            raise ValueError(
                f"questions is {questions}, but {documents} documents drawn here hold "
                f"{len(facts)} facts; ask fewer questions or draw more documents"
            )
        pairs += [(prompt(drawn, q), answer) for q, answer in rng.sample(facts, questions)]
    return pairs


_draw_documents = documents  # `batch` has an argument of that name


class _Draw:
    """Draws values; one method per kind of value."""

    def __init__(self, rng: random.Random, taken: set[str]) -> None:
        self.rng = rng
        self.taken = taken

    def name(self) -> str:
        while True:
            name = self.rng.choice(_STARTS) + self.rng.choice(_ENDS)
            if name not in self.taken:
                self.taken.add(name)
                return name

    def person(self) -> str:
        return f"{self.rng.choice(_FIRST_NAMES)} {self.name()}"

    def address(self) -> str:
        return f"{self.rng.randint(1, 99)} {self.name()} {self.rng.choice(_STREETS)}"

    def morning(self) -> str:
        return f"{self.rng.randint(6, 11)}:{self.rng.randrange(0, 60, 5):02d}"

    def evening(self) -> str:
        return f"{self.rng.randint(16, 23)}:{self.rng.randrange(0, 60, 5):02d}"

    def price(self) -> str:
        return f"{self.rng.randint(2, 60)} crowns"

    def room(self) -> str:
        return str(self.rng.randint(101, 599))

    def year(self) -> str:
        return str(self.rng.randint(1650, 1999))

    def day(self) -> str:
        return self.rng.choice(_DAYS)

    def number(self) -> str:
        return f"{self.rng.randint(1, 29)},{self.rng.randrange(0, 1000, 10):03d}"

    def telephone(self) -> str:
        return " ".join(f"{self.rng.randint(10, 99)}" for _ in range(3))

    def cheap_item(self) -> str:
        return self.rng.choice(_ITEMS[::2])

    def other_item(self) -> str:
        return self.rng.choice(_ITEMS[1::2])


class _Topic(NamedTuple):
    """What is told together: slots to fill, ways to say it, and ways to ask for single slots."""

    slots: dict[str, str]
    sentences: tuple[str, ...]
    questions: dict[str, tuple[str, ...]]


class _Kind(NamedTuple):
    subjects: tuple[str, ...]
    opening: _Topic
    topics: list[_Topic]


def _named(subject: str) -> dict[str, str]:
    return {"s": subject, "ss": subject + ("'" if subject.endswith("s") else "'s")}


_STARTS = """Al Bel Bram Bren Cal Cor Dal Dun El Fal Fen Gar Hal Har Hol Kel Kir Lan Lin Lor Mar
Mel Mor Nor Or Pel Per Quin Ros Sel Sten Tal Tor Val Wen Win""".split()
_ENDS = """bach berg bury by combe croft dale den don field ford ham hurst land ley low mere
mont more rick ridge row sen shaw stead ton vale wald wick worth""".split()
_FIRST_NAMES = """Ada Agnes Albert Alice Anna Anton Astrid Boris Bruno Carla Cecil Clara Conrad
Cora Daniel Dora Edgar Edith Elena Emil Emma Ernst Esther Felix Flora Frank Freda George Greta
Gustav Hanna Harold Hedda Helen Henry Hugo Ida Igor Ingrid Iris Ivan Jacob Jane Joan Jonas Julia
Karl Klara Laura Leo Lena Lewis Lotte Louis Lucy Magnus Mara Martin Maud Max Mila Nina Nora Olaf
Olga Oscar Otto Paula Peter Petra Philip Rosa Rudolf Ruth Samuel Selma Sofia Stella Sven Thea
Thomas Tilda Tobias Ursula Vera Victor Walter Wanda Willa Xenia""".split()
_STREETS = "Street Road Lane Square Hill Row Avenue Gardens".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_ITEMS = """seeded loaf|desk lamp|plum cake|wall clock|jar of honey|brass kettle|pot of tea|wool
blanket|cheese roll|leather bag|paper kite|silver spoon|bar of soap|glass bowl|box of candles|wooden
chair|ginger biscuit|walking stick|ball of yarn|copper pan|pocket map|reading lamp|bunch of
tulips|garden bench""".replace("\n", " ").split("|")


def _post(role: str) -> _Topic:
    """Someone with an office. Every document can have several, so that rooms and people compete."""
    return _Topic(
        {"person": "person", "room": "room"},
        (
            f"{{ss}} {role} is {{person}}, whose office is in room {{room}}.",
            f"{{ss}} {role} is {{person}}, in room {{room}}.",
            f"at {{s}} the {role} is {{person}} and can be found in room {{room}}.",
        ),
        {
            "person": (f"Who is the {role} of {{s}}?", f"What is the name of {{ss}} {role}?"),
            "room": (
                "In which room is the office of {person}?",
                "In which room can {person} be found?",
                f"In which room is the {role} of {{s}}?",
            ),
        },
    )


def _amount(what: str, *sentences: str) -> _Topic:
    return _Topic({"number": "number"}, sentences, {"number": (f"How many {what} {{s}}?",)})


_ADDRESS = _Topic(
    {"address": "address"},
    ("{s} is at {address}.", "you will find {s} at {address}.", "{ss} address is {address}."),
    {"address": ("What is the address of {s}?", "At which address is {s}?")},
)
_HOURS = _Topic(
    {"opens": "morning", "closes": "evening"},
    (
        "{s} opens at {opens} and closes at {closes}.",
        "{ss} doors are open from {opens} until {closes}.",
        "visitors to {s} are welcome between {opens} and {closes}.",
    ),
    {
        "opens": ("When does {s} open?", "At what time does {s} open?"),
        "closes": ("When does {s} close?", "At what time does {s} close?"),
    },
)
_CLOSED = _Topic(
    {"day": "day"},
    ("{s} is closed every {day}.", "{s} stays shut every {day}.", "{ss} day of rest is {day}."),
    {"day": ("On which day is {s} closed?",)},
)
_FOUNDED = _Topic(
    {"year": "year", "person": "person"},
    (
        "{s} was founded in {year} by {person}.",
        "{ss} history began in {year}, when it was founded by {person}.",
        "{s} was started in {year} by {person}.",
    ),
    {
        "year": ("In which year was {s} founded?", "When was {s} founded?"),
        "person": ("Who founded {s}?", "Who was the founder of {s}?"),
    },
)
_TELEPHONE = _Topic(
    {"telephone": "telephone"},
    ("{ss} telephone number is {telephone}.", "to reach {s} by telephone, dial {telephone}."),
    {"telephone": ("What is the telephone number of {s}?", "Which number reaches {s}?")},
)
_TICKETS = _Topic(
    {"ticket": "price", "tour": "price"},
    (
        "at {s} a ticket costs {ticket} and a guided tour {tour}.",
        "{s} asks for a ticket {ticket}, for a guided tour {tour}.",
        "at {s} a guided tour is {tour}, a simple ticket {ticket}.",
    ),
    {
        "ticket": ("How much is a ticket to {s}?", "What does a ticket to {s} cost?"),
        "tour": (
            "How much is a guided tour of {s}?",
            "What does a guided tour of {s} cost?",
        ),
    },
)
_GOODS = _Topic(
    {"a": "cheap_item", "b": "other_item", "price_a": "price", "price_b": "price"},
    (
        "at {s} a {a} costs {price_a} and a {b} {price_b}.",
        "{s} sells a {b} for {price_b} and a {a} for {price_a}.",
        "{ss} prices are fair: a {a} is {price_a}, a {b} {price_b}.",
    ),
    {
        "price_a": ("How much is a {a} at {s}?", "What does a {a} cost at {s}?"),
        "price_b": ("How much is a {b} at {s}?", "What does a {b} cost at {s}?"),
    },
)
_TRAINS = _Topic(
    {"first": "morning", "last": "evening", "town": "name"},
    (
        "from {s} trains go to {town}, the first at {first} and the last at {last}.",
        "trains run from {s} to {town}, the first at {first}, the last at {last}.",
    ),
    {
        "first": ("When does the first train leave {s}?",),
        "last": ("When does the last train leave {s}?",),
        "town": ("To which town do trains from {s} go?", "Where do trains from {s} go?"),
    },
)
_MARKET = _Topic(
    {"day": "day"},
    ("{ss} market is held every {day}.", "{s} holds a market every {day}."),
    {"day": ("On which day is the market in {s}?",)},
)


def _place(*words: str) -> _Topic:
    return _Topic(
        {"town": "name"},
        tuple(f"{{s}} is {word} in the town of {{town}}." for word in words),
        {"town": ("In which town is {s}?",)},
    )


_KINDS = (
    _Kind(
        ("the {} Museum", "the {} Gallery", "the {} Collection"),
        _place("a museum", "a small museum", "a much loved museum"),
        [
            _ADDRESS,
            _HOURS,
            _TICKETS,
            _FOUNDED,
            _TELEPHONE,
            _post("director"),
            _post("curator"),
            _amount(
                "paintings hang in",
                "{s} shows {number} paintings.",
                "the walls of {s} hold {number} paintings.",
            ),
        ],
    ),
    _Kind(
        ("the {} Bakery", "the {} Bookshop", "the {} Tea House", "the {} Store"),
        _place("a shop", "a family shop", "a popular shop"),
        [
            _ADDRESS,
            _HOURS,
            _CLOSED,
            _GOODS,
            _FOUNDED,
            _TELEPHONE,
            _post("owner"),
        ],
    ),
    _Kind(
        ("{}",),
        _Topic(
            {"river": "name"},
            (
                "The town of {s} lies on the river {river}.",
                "The town of {s} was built by the river {river}.",
            ),
            {"river": ("On which river is {s}?", "Which river flows through {s}?")},
        ),
        [
            _MARKET,
            _TRAINS,
            _FOUNDED,
            _TELEPHONE,
            _post("mayor"),
            _post("town clerk"),
            _amount(
                "people live in", "{s} has {number} inhabitants.", "{s} is home to {number} people."
            ),
        ],
    ),
    _Kind(
        ("{} Instruments", "{} Glassworks", "{} Shipping", "{} Textiles"),
        _Topic(
            {"town": "name"},
            (
                "The company {s} has its seat in the town of {town}.",
                "The company {s} works in the town of {town}.",
            ),
            {"town": ("In which town is {s}?",)},
        ),
        [
            _ADDRESS,
            _GOODS,
            _FOUNDED,
            _TELEPHONE,
            _post("director"),
            _post("accountant"),
            _amount(
                "people work for",
                "{s} employs {number} people.",
                "{s} gives work to {number} people.",
            ),
        ],
    ),
    _Kind(
        ("the {} Library", "the {} Archive", "the {} Reading Room"),
        _place("a library", "a public library", "a quiet library"),
        [
            _ADDRESS,
            _HOURS,
            _CLOSED,
            _FOUNDED,
            _TELEPHONE,
            _post("head librarian"),
            _post("archivist"),
            _amount(
                "books are in",
                "{s} holds {number} books.",
                "the shelves of {s} carry {number} books.",
            ),
        ],
    ),
)

_FORMS = [(form, kind) for kind in _KINDS for form in kind.subjects]
