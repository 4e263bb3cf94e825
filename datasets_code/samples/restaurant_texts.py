"""Made-up restaurants: meaning representations in E2E-NLG's notation, and several ways to say each."""

from __future__ import annotations

import random

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "name": (
        "The Copper Kettle",
        "Larkspur",
        "The Quiet Heron",
        "Juniper Hall",
        "The Tin Whistle",
        "Saffron Gate",
        "The Lost Anchor",
        "Bellweather",
        "The Painted Door",
        "Marigold Corner",
        "The Stone Bridge",
        "Driftwood",
    ),
    "eatType": ("restaurant", "pub", "coffee shop"),
    "food": ("Italian", "French", "Japanese", "Indian", "Chinese", "English", "Fast food"),
    "priceRange": ("cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"),
    "customer rating": ("low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"),
    "area": ("riverside", "city centre"),
    "familyFriendly": ("yes", "no"),
    "near": (
        "Café Lumen",
        "The Old Granary",
        "Hilltop Hotel",
        "Market Arcade",
        "The Blue Lantern",
        "Café Verano",
    ),
}
PRICES = {
    "cheap": "cheap prices",
    "moderate": "moderate prices",
    "high": "high prices",
    "less than £20": "prices of less than £20",
    "£20-25": "prices between £20 and £25",
    "more than £30": "prices of more than £30",
}

Meaning = dict[str, str]


def draw_meaning(source: random.Random) -> Meaning:
    """Returns a name, a type and two to six further attributes, in the notation's order."""
    optional = [key for key in ATTRIBUTES if key not in ("name", "eatType")]
    chosen = {"name", "eatType", *source.sample(optional, source.randint(2, len(optional)))}
    return {key: source.choice(values) for key, values in ATTRIBUTES.items() if key in chosen}


def notation(meaning: Meaning) -> str:
    """Returns a meaning as `name[...], eatType[...]`."""
    return ", ".join(f"{key}[{value}]" for key, value in meaning.items())


def say(meaning: Meaning) -> list[str]:
    """Returns three descriptions of a restaurant, each with all its attributes."""
    return [one_by_one(meaning), place_first(meaning), rating_first(meaning)]


def one_by_one(meaning: Meaning) -> str:
    """Returns a description that names the attributes in order."""
    text = f"{meaning['name']} is {article(kind(meaning))}{serving(meaning, ' with ')}{place(meaning)}."
    return text + rating(meaning, " It has") + family(meaning, " It is")


def place_first(meaning: Meaning) -> str:
    """Returns a description that begins with where the place is."""
    where = place(meaning).strip()
    start = f"Located {where}, {meaning['name']}" if where else meaning["name"]
    food = meaning.get("food", "").replace("Fast food", "fast")
    middle = f" serves {food} food" if food else f" is {article(meaning['eatType'])}"
    text = f"{start}{middle}{serving(meaning, ' at ')}."
    if food:
        text += f" It is {article(meaning['eatType'])}."
    return text + family(meaning, " The place is") + rating(meaning, " It has")


def rating_first(meaning: Meaning) -> str:
    """Returns a description that begins with what customers say."""
    opening = rating(meaning, "With").strip().rstrip(".")
    subject = f"{meaning['name']} is {article(kind(meaning))}"
    text = (
        f"{opening}, {subject}" if opening else f"There is {article(kind(meaning))} called {meaning['name']}"
    )
    return text + f"{place(meaning)}.{prices(meaning)}{family(meaning, ' It is')}"


def kind(meaning: Meaning) -> str:
    """Returns food and type, such as 'French pub'."""
    food = meaning.get("food")
    if food is None:
        return meaning["eatType"]
    if food == "Fast food":
        return f"fast food {meaning['eatType']}"
    return f"{food} {meaning['eatType']}"


def article(noun: str) -> str:
    """Returns a noun with its indefinite article."""
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def serving(meaning: Meaning, link: str) -> str:
    """Returns the price range, linked to what stands before."""
    return f"{link}{PRICES[meaning['priceRange']]}" if "priceRange" in meaning else ""


def prices(meaning: Meaning) -> str:
    """Returns the price range as a sentence."""
    return f" You can expect {PRICES[meaning['priceRange']]}." if "priceRange" in meaning else ""


def place(meaning: Meaning) -> str:
    """Returns area and neighbour."""
    area = {"riverside": " in the riverside area", "city centre": " in the city centre"}.get(
        meaning.get("area", ""), ""
    )
    return area + (f" near {meaning['near']}" if "near" in meaning else "")


def rating(meaning: Meaning, start: str) -> str:
    """Returns the customer rating as a sentence."""
    value = meaning.get("customer rating")
    return (
        ""
        if value is None
        else f"{start} {article(value) if value[0].isalpha() else 'a ' + value} customer rating."
    )


def family(meaning: Meaning, start: str) -> str:
    """Returns whether families are welcome as a sentence."""
    friendly = {"yes": "family-friendly", "no": "not family-friendly"}.get(meaning.get("familyFriendly", ""))
    return f"{start} {friendly}." if friendly else ""
