# ruff: noqa: SIM905 (lists of words are easier to read in one string)
"""Words, names, numbers and dates of generated documents, and templates that are filled with them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

FIRST = (
    "Amina Bertrand Chiara Dmitri Eszter Farid Greta Hamish Ingrid Jamal Keiko Leopold Mirela Nadia Ottavio Priya "
    "Rafael Saskia Thabo Ursula Viktor Wanjiru Xavier Yusuf Zofia Alden Birgit Cosmo Delphine Emeka Florian Giulia "
    "Hiroshi Ilse Joaquin Kwame Linnea Mateo Noor Odette Pavel Rosalind Stefan Tomasz Vera Wilhelm Yara Anselm "
    "Beatriz Callum Dorothea Elias Fumiko Gideon Henrietta Ismail Jolanta Katarina Lorenzo Margaret Nikolai Olga "
    "Philippa Ruben Sunita Theodore Valentina Winifred Alice George Mary John Helen Robert Susan Peter Anne Thomas"
).split()
LAST = (
    "Abernathy Bakker Castellano Dragomir Eriksen Fontaine Gruber Hollis Ivanova Jensen Kowalski Lindqvist Mbeki "
    "Nakamura Okafor Pereira Quist Rasmussen Szabo Thornton Ueda Vasquez Whitlock Yilmaz Zimmermann Ashdown Bellamy "
    "Crane Duarte Eastwood Faulkner Ghosh Haddad Ibarra Jovanovic Kaplan Laurent Moretti Novak Ortega Prescott Rahman "
    "Silva Tennant Usman Vogel Wexler Yamada Zeller Barlow Chandra Drummond Falk Greaves Hartley Kessler Lowell "
    "Marchetti Nyberg Osei Pohl Reyes Sinclair Tran Weaver Smith Brown Miller Clarke Fischer Dubois Rossi Hansen"
).split()
REAL_PLACES = (
    "Lyon Bergen Porto Kraków Valparaíso Adelaide Mombasa Osaka Winnipeg Tampere Bologna Leipzig Cork Gdańsk Tbilisi "
    "Montevideo Pune Izmir Sfax Rotterdam Halifax Dunedin Zagreb Antwerp Bristol Boston Denver Memphis Savannah Omaha"
).split()
COUNTRIES = (
    "Portugal Norway Kenya Japan Canada Finland Italy Germany Ireland Poland Georgia Uruguay India Turkey Tunisia Chile"
).split()
TRADES = (
    "surveyor|engineer|botanist|printer|physician|painter|teacher|bookseller|watchmaker|geologist|sculptor|judge|"
    "composer|navigator|chemist|translator|architect|farmer|weaver|photographer|journalist|pharmacist|blacksmith|"
    "astronomer|librarian|shipbuilder|economist|cellist|gardener|harbour master|glassblower|cook"
).split("|")
THINGS = (
    "lantern|ledger|copper kettle|violin|umbrella|anchor|hammer|wool coat|telescope|bicycle|typewriter|rowing boat|"
    "iron gate|oak table|parcel|camera|chessboard|globe|sewing machine|barometer|suitcase|ladder|clay pot|silver coin|"
    "map|notebook|water pump|bell|lamp|mirror|stove|sledge|wheelbarrow|piano|kite|drum|basket|blue ribbon"
).split("|")
GOODS = (
    "wheat|copper|timber|salt|wool|olive oil|cement|paper|coal|rice|tea|glass|leather|cotton|sugar|bricks|slate|wine|"
    "barley|iron ore|herring|cork|linen|potatoes|honey|cocoa|rubber|tin|amber|apples"
).split("|")
ANIMALS = "heron|otter|badger|lynx|plover|salamander|dormouse|stork|ibex|marten|owl|newt|beaver|hare|kestrel".split("|")
BUILDINGS = (
    "lighthouse|mill|town hall|library|bridge|theatre|granary|hospital|observatory|railway station|market hall|school|"
    "monastery|warehouse|concert hall|swimming bath|museum|power station|dam|castle"
).split("|")
ADJECTIVES = (
    "old|narrow|quiet|crowded|bright|muddy|steep|modest|famous|wooden|distant|cheerful|damp|ragged|elegant|hollow|"
    "patient|sudden|brittle|curious|heavy|pale|stubborn|generous|green|grey|red|white|small|broad"
).split("|")
FIELDS = (
    "hydraulics|botany|optics|harbour law|music theory|map making|medicine|soil chemistry|folk songs|bridge design|"
    "statistics|weaving|astronomy|printing|navigation|public health|grammar|geology|ceramics|forestry"
).split("|")
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = (
    "two three four five six seven eight nine ten eleven twelve fourteen fifteen eighteen twenty thirty forty"
).split()
UNITS = "metres|kilometres|kilograms|tonnes|litres|hectares|feet|miles|acres|pounds|barrels|crates".split("|")
_ONSETS = "B Br C Cl D Dr F Fl G Gr H K Kr L M N P Pr R S Sk St T Tr V W Z".split()
_NUCLEI = "a e i o u ai ea ou".split()
_CODAS = "l n r s m nd rt ll ss ck v".split()
_ENDS = "ford ton holm berg vik mouth ham dale wick stad field grad ova eda ino ara haven bridge minster".split()
_PLACES_OF_TWO = ("Upper {}", "{} Bay", "Port {}", "New {}", "{} Falls", "Saint {}", "Lake {}", "{} Hill")

Rng = random.Random


def word(rng: Rng) -> str:
    """Return an invented name of a few letters."""
    return rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)


def person(rng: Rng) -> str:
    """Return a first name and a surname, sometimes an invented one."""
    last = word(rng) + rng.choice(_ENDS[:12]) if rng.random() < 0.3 else rng.choice(LAST)
    middle = f" {rng.choice('ABCDEFGHJKLMNPRSTW')}." if rng.random() < 0.12 else ""
    return f"{rng.choice(FIRST)}{middle} {last}"


def place(rng: Rng) -> str:
    """Return a town, mostly an invented one."""
    if rng.random() < 0.3:
        return rng.choice(REAL_PLACES)
    town = word(rng) + rng.choice(_ENDS)
    return rng.choice(_PLACES_OF_TWO).format(town) if rng.random() < 0.15 else town


def count(rng: Rng) -> str:
    """Return a number in one of the ways in which people write them."""
    size = rng.choice((10, 100, 1000, 10_000, 100_000, 10_000_000))
    number = rng.randrange(2, size)
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(NUMBERS)
    return f"{number:,}" if kind < 0.6 else str(number)


def ordinal(number: int) -> str:
    """Return a number of an order, such as 22nd."""
    end = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{end}"


def date(rng: Rng) -> str:
    """Return a day in one of several formats."""
    year, month, day = rng.randrange(1480, 2031), rng.randrange(12), rng.randrange(1, 29)
    return rng.choice((
        f"{day} {MONTHS[month]} {year}", f"{MONTHS[month]} {day}, {year}", f"{MONTHS[month]} {year}",
        f"{year}-{month + 1:02}-{day:02}", f"{day}/{month + 1}/{year}", f"the {ordinal(day)} of {MONTHS[month]} {year}",
    ))  # fmt: skip


def clock(rng: Rng) -> str:
    """Return a time of day."""
    hour, minute = rng.randrange(24), rng.randrange(0, 60, 5)
    return rng.choice(
        (f"{hour}:{minute:02}", f"{hour % 12 + 1}.{minute:02} {'ap'[hour < 12]}.m.", f"{hour:02}{minute:02}")
    )


def money(rng: Rng) -> str:
    """Return a sum of money."""
    number = rng.randrange(2, rng.choice((50, 900, 40_000, 3_000_000)))
    return rng.choice((
        f"${number:,}", f"€{number:,}.{rng.randrange(100):02}", f"£{number:,}", f"{number:,} crowns",
        f"{number} francs", f"{number / 7:,.2f} dollars",
    ))  # fmt: skip


def code(rng: Rng) -> str:
    """Return an identifier such as those on parcels, tickets and parts."""
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randrange(2, 4)))
    digits = "".join(rng.choices("0123456789", k=rng.randrange(2, 7)))
    return rng.choice(
        (f"{letters}-{digits}", f"{letters}{digits}", f"{digits}/{letters}", f"#{digits}", f"{digits}-{letters}")
    )


def _one(*pool: str) -> Callable[[Rng], str]:
    return lambda rng: rng.choice(pool)


PARTS: dict[str, Callable[[Rng], str]] = {
    "person": person, "place": place, "count": count, "date": date, "clock": clock, "money": money, "code": code,
    "word": word, "first": _one(*FIRST), "last": _one(*LAST), "country": _one(*COUNTRIES), "trade": _one(*TRADES),
    "thing": _one(*THINGS), "goods": _one(*GOODS), "animal": _one(*ANIMALS), "building": _one(*BUILDINGS),
    "adj": _one(*ADJECTIVES), "field": _one(*FIELDS), "month": _one(*MONTHS), "day": _one(*DAYS), "unit": _one(*UNITS),
    "few": _one(*NUMBERS), "year": lambda rng: str(rng.randrange(1480, 2031)),
    "nth": lambda rng: ordinal(rng.randrange(2, 31)), "n": lambda rng: str(rng.randrange(2, 100)),
    "pct": lambda rng: f"{rng.randrange(1, 990) / 10:.1f}%", "nn": lambda rng: str(rng.randrange(100, 10_000)),
    "dec": lambda rng: f"{rng.randrange(1, 9999) / 100:.2f}",
    "tel": lambda rng: f"{rng.randrange(100, 999)} {rng.randrange(10, 99)} {rng.randrange(100, 9999)}",
}  # fmt: skip
"""What fills a slot of a template, by name."""

_SLOT, _CHOICE = re.compile(r"\{(\w+?)(\d*)\}"), re.compile(r"\[([^\[\]]*)\]")


def fill(template: str, rng: Rng, bound: dict[str, str], choices: bool = True) -> str:
    """Fill a template.

    `[a|b]` becomes a or b, `{place}` a new place, and `{place1}` the same place wherever it stands.

    Args:
        template: The template.
        rng: Source of chance.
        bound: What numbered slots hold, to which new ones are added, and other names.
        choices: Whether square brackets are choices, as they are everywhere but in code.
    """
    while choices and _CHOICE.search(template):
        template = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), template)

    def slot(found: re.Match[str]) -> str:
        name = found[1] + found[2]
        if name in bound:
            return bound[name]
        text = PARTS[found[1]](rng)
        return bound.setdefault(name, text) if found[2] else text

    return _SLOT.sub(slot, template)
