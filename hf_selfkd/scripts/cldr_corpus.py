"""
A real English-German corpus that needs no download: 10,000 pairs of short phrases.

Everything comes from the CLDR, the locale data that operating systems and browsers write dates, units and names with
(as shipped by Babel), and from num2words; nothing was translated by hand:

    Monday, March 4, 2019, 3:05 PM          Montag, 4. März 2019, 15:05
    12.5 light years and 1 teaspoon         12,5 Lichtjahre und 1 Teelöffel
    Peru, Côte d'Ivoire, or Sri Lanka       Peru, Côte d'Ivoire oder Sri Lanka
    two hundred and seven                   zweihundertsieben

Validation and test combine the words of train, some numbers aside, in ways that train does not have: the splits share
no sentence in either language, not even one with its words in another order.

    pip install "hf_selfkd[translation]"
    python -m hf_selfkd.scripts.cldr_corpus corpus --seed 0    # corpus/train.jsonl, validation.jsonl and test.jsonl
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

from babel import Locale
from babel.dates import format_date, format_interval, format_skeleton, format_time, format_timedelta
from babel.dates import get_datetime_format as datetime_format
from babel.lists import format_list
from babel.localedata import locale_identifiers
from babel.numbers import format_compact_decimal, format_currency
from babel.units import UnknownUnitError, format_unit
from num2words import num2words


Pair = tuple[str, str]
ENGLISH_GERMAN = (Locale("en"), Locale("de"))
SPACES = str.maketrans(dict.fromkeys("\u00a0\u2009\u202f", " "))


def both(write: Callable[[Locale], str]) -> Pair:
    """The same thing in both languages, with plain spaces."""
    english, german = (write(locale).translate(SPACES) for locale in ENGLISH_GERMAN)
    return english, german


# Words and names


def names() -> dict[str, list[Pair]]:
    """Names by kind, each a list in the order of CLDR's codes."""
    found = {}
    for kind in ("territories", "languages", "scripts", "currencies"):
        english, german = (getattr(locale, kind) for locale in ENGLISH_GERMAN)
        found[kind] = [(english[code], german[code]) for code in sorted(english.keys() & german.keys())]
    english, german = (dict(zone_names(locale)) for locale in ENGLISH_GERMAN)
    found["zones"] = [(english[code], german[code]) for code in sorted(english.keys() & german.keys())]
    found["days"] = [both(lambda locale, day=day: locale.days["stand-alone"]["wide"][day]) for day in range(7)]
    found["months"] = [both(lambda locale, m=m: locale.months["stand-alone"]["wide"][m]) for m in range(1, 13)]
    # A comma within a name would read as a list.
    return {kind: [pair for pair in pairs if "," not in "".join(pair)] for kind, pairs in found.items()}


def zone_names(locale: Locale) -> Iterator[tuple[tuple[str, str], str]]:
    """The names of time zones that are written out, such as `Central European Summer Time`."""
    for zone, forms in locale.meta_zones.items():
        for form, name in forms.get("long", {}).items():
            yield (zone, form), name


def locale_names() -> list[Pair]:
    """The names of languages as spoken or written somewhere, such as `Serbian (Cyrillic, Kosovo)`."""
    codes = [Locale.parse(code) for code in sorted(locale_identifiers()) if "_" in code]
    found = [tuple(code.get_display_name(locale) for locale in ENGLISH_GERMAN) for code in codes]
    return [pair for pair in found if None not in pair]


def units() -> list[str]:
    """The units that both languages have a name for; otherwise Babel writes the code of the unit."""
    known = []
    for unit in ENGLISH_GERMAN[0].unit_display_names:
        try:
            texts = both(
                lambda locale, unit=unit: format_unit(2, unit, locale=locale) + format_unit(1, unit, locale=locale)
            )
        except UnknownUnitError:
            continue
        if not any(unit in text for text in texts):
            known.append(unit)
    return sorted(known)


def spelled(number: int, form: str) -> Pair:
    """A number in words: `cardinal`, `ordinal` or `year`."""
    return both(lambda locale: num2words(number, lang=locale.language, to=form))


# Phrases


class Phrases:
    """Random phrases; a method for each kind takes the random numbers from `rng` and returns a pair."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names = names()
        self.units = units()
        self.currencies = sorted(ENGLISH_GERMAN[0].currencies.keys() & ENGLISH_GERMAN[1].currencies.keys())
        self.locales = locale_names()

    def number(self) -> int | Decimal:
        """Small, large or with a decimal: plurals and separators differ."""
        large = self.rng.randrange(1, 30000)
        return self.rng.choice([1, self.rng.randrange(2, 20), large, Decimal(large) / 10])

    def day(self) -> datetime.date:
        return datetime.date(1950, 1, 1) + datetime.timedelta(days=self.rng.randrange(31000))

    def quantity(self) -> Pair:
        unit, number = self.rng.choice(self.units), self.number()
        return both(lambda locale: format_unit(number, unit, locale=locale))

    def money(self) -> Pair:
        currency, number = self.rng.choice(self.currencies), self.number()
        return both(lambda locale: format_currency(number, currency, locale=locale, format_type="name"))

    def large_number(self) -> Pair:
        number, digits = int(10 ** self.rng.uniform(3, 12)), self.rng.randrange(3)
        return both(
            lambda locale: format_compact_decimal(number, format_type="long", locale=locale, fraction_digits=digits)
        )

    def words(self) -> Pair:
        form = self.rng.choice(["cardinal", "ordinal", "year"])
        return spelled(self.rng.randrange(1100, 2100) if form == "year" else self.rng.randrange(1000), form)

    def delay(self) -> Pair:
        unit = self.rng.choice(["year", "month", "week", "day", "hour", "minute", "second"])
        seconds = {"year": 31536000, "month": 2592000, "week": 604800, "day": 86400, "hour": 3600, "minute": 60}
        delta = datetime.timedelta(seconds=self.rng.choice([-1, 1]) * self.rng.randrange(1, 60) * seconds.get(unit, 1))
        return both(
            lambda locale: format_timedelta(delta, granularity=unit, threshold=1e9, add_direction=True, locale=locale)
        )

    def date(self) -> Pair:
        day, style = self.day(), self.rng.choice(["full", "long", "MMMMd", "yMMMM", "yQQQQ", "yw", "MMMMW", "GyMMM"])
        if style in ("full", "long"):
            return both(lambda locale: format_date(day, style, locale=locale))
        return both(lambda locale: format_skeleton(style, day, locale=locale))

    def appointment(self) -> Pair:
        day, style = self.day(), self.rng.choice(["full", "long"])
        time = datetime.time(self.rng.randrange(24), 5 * self.rng.randrange(12))

        def write(locale: Locale) -> str:
            pattern = datetime_format(style, locale=locale).replace("'", "")
            texts = format_time(time, "short", locale=locale), format_date(day, style, locale=locale)
            return pattern.replace("{0}", texts[0]).replace("{1}", texts[1])

        return both(write)

    def interval(self) -> Pair:
        start, style = self.day(), self.rng.choice(["yMMMM", "yMMMd", "yMMMEd", "MMMEd", "MMMd"])
        end = start + datetime.timedelta(days=int(10 ** self.rng.uniform(0.1, 3)))
        return both(lambda locale: format_interval(start, end, style, locale=locale))

    def locale(self) -> Pair:
        return self.rng.choice(self.locales)

    def enumeration(self) -> Pair:
        """Two or three names of one kind, or two short phrases of one kind."""
        size, style = self.rng.choice([2, 3]), self.rng.choice(["standard", "or"])
        source = self.rng.choice([*self.names, *self.names, "quantity", "quantity", "money", "words", "delay"])
        if source in self.names:
            items = self.rng.sample(self.names[source], size)
        else:
            items = [getattr(self, source)() for _ in range(2)]
        english, german = (
            format_list(texts, style=style, locale=locale)
            for texts, locale in zip(zip(*items, strict=True), ENGLISH_GERMAN, strict=True)
        )
        return english, german

    def glossary(self) -> list[Pair]:
        """Every name, every unit in singular and plural, and the numbers that others are made of."""
        pairs = [pair for kind in self.names.values() for pair in kind]
        pairs += [
            both(lambda locale, unit=unit, n=n: format_unit(n, unit, locale=locale))
            for unit in self.units
            for n in (1, 2)
        ]
        numbers = [*range(21), *range(30, 100, 10), *range(100, 1000, 100)]
        return pairs + [spelled(number, form) for number in numbers for form in ("cardinal", "ordinal")]


# Shares of the phrases that are not in the glossary.
SHARES = {
    Phrases.enumeration: 40,
    Phrases.quantity: 10,
    Phrases.money: 7,
    Phrases.date: 8,
    Phrases.appointment: 8,
    Phrases.interval: 8,
    Phrases.words: 8,
    Phrases.delay: 4,
    Phrases.locale: 5,
    Phrases.large_number: 2,
}


class Distinct:
    """Keeps pairs apart: no sentence twice in either language, whatever the order of its words."""

    def __init__(self) -> None:
        self.seen: tuple[set, set] = set(), set()

    def add(self, pair: Pair) -> bool:
        """Remember the pair, unless one of its sentences is known."""
        samples = [tuple(sorted(text.replace(",", " ").split())) for text in pair]
        if any(key in seen for key, seen in zip(samples, self.seen, strict=True)):
            return False
        for key, seen in zip(samples, self.seen, strict=True):
            seen.add(key)
        return True


def make_corpus(seed: int = 0, size: int = 10000, held_out: int = 1000) -> dict[str, list[dict[str, str]]]:
    """
    The corpus; the same arguments, with the same versions of Babel and num2words, give the same pairs.

    Args:
        seed (`int`, *optional*, defaults to 0): Chooses the phrases and the splits.
        size (`int`, *optional*, defaults to 10000): Pairs in all; the glossary of some 2,000 is always among them.
        held_out (`int`, *optional*, defaults to 1000): Pairs of validation, and of test.

    Returns:
        `dict`: `train`, `validation` and `test`, each a list of `{"en": ..., "de": ...}`.
    """
    rng = random.Random(seed)
    phrases, distinct = Phrases(rng), Distinct()
    glossary = [pair for pair in phrases.glossary() if distinct.add(pair)]
    others: list[Pair] = []
    if size < len(glossary) + 2 * held_out:
        raise ValueError(
            f"size: {size} is too small; at least {len(glossary) + 2 * held_out} with held_out={held_out}."
        )
    while len(others) < size - len(glossary):
        (make,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
        pair = make(phrases)
        if distinct.add(pair):
            others.append(pair)
    train = glossary + others[2 * held_out :]
    rng.shuffle(train)
    splits = {"train": train, "validation": others[:held_out], "test": others[held_out : 2 * held_out]}
    return {split: [{"en": en, "de": de} for en, de in pairs] for split, pairs in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the three files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=10000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in make_corpus(args.seed, args.size).items():
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (args.folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
