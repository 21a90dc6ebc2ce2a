"""Mathematics problems from a seed, in words of our own: simple ones, and ones that no small model does in its head.

   python -m atp_jax.scenarios.generate_problems [--simple 96] [--complex 96] [--seed 0] --out P.json

--simple   word problems of one to three small operations
--complex  long products, powers modulo a number, sums over ranges, counting; every answer is a whole number
--seed     what they are drawn from; a smaller number of problems is the beginning of a larger one
--out      where they are written, as a problem file for `data.path`

Exit status 0; 2 with one line on stderr for anything that you can mend.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from atp_jax.scenarios.generate import command, parse, write

Worded = tuple[str, int]  # a question and its answer

_NAMES = ("Ada", "Bruno", "Clara", "Dario", "Edith", "Farid", "Greta", "Hamid", "Ines", "Jonas", "Kira", "Lars")
_GOODS = ("pears", "candles", "tickets", "tiles", "ribbons", "stamps", "bulbs", "jars", "bricks", "pencils")
_HOLDERS = ("crates", "shelves", "bags", "rows", "drawers", "trays")


# ---------------------------------------------------------------- simple: one to three small operations


def _change(rng: random.Random) -> Worded:
    count, price, rest = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 20)
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    paid = count * price + rest
    return f"{name} buys {count} {goods} at {price} coins each and hands over {paid} coins. How many come back?", rest


def _packed(rng: random.Random) -> Worded:
    each, holders, loose = rng.randint(3, 12), rng.randint(2, 9), rng.randint(2, 12)
    goods, where = rng.choice(_GOODS), rng.choice(_HOLDERS)
    asked = f"A store has {holders} {where} with {each} {goods} in each, and {loose} loose ones."
    return f"{asked} How many {goods} are there?", each * holders + loose


def _shared(rng: random.Random) -> Worded:
    people, each, more = rng.randint(2, 8), rng.randint(2, 12), rng.randint(1, 9)
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    asked = f"{people} friends share {people * each} {goods} equally. {name} is one of them and finds {more} more."
    return f"{asked} How many does {name} have now?", each + more


def _walked(rng: random.Random) -> Worded:
    speed, hours, left = rng.randint(3, 9), rng.randint(2, 6), rng.randint(2, 20)
    name = rng.choice(_NAMES)
    asked = f"{name} walks {speed} km an hour for {hours} hours on a path of {speed * hours + left} km."
    return f"{asked} How many km are left?", left


def _aged(rng: random.Random) -> Worded:
    older, younger = rng.sample(_NAMES, 2)
    age, gap, years = rng.randint(5, 40), rng.randint(2, 15), rng.randint(2, 12)
    asked = f"{younger} is {age} years old, and {older} is {gap} years older."
    return f"{asked} How old will {older} be in {years} years?", age + gap + years


def _fenced(rng: random.Random) -> Worded:
    long, wide = rng.randint(6, 60), rng.randint(2, 40)
    return f"A garden is {long} m long and {wide} m wide. How many metres of fence go around it?", 2 * (long + wide)


def _saved(rng: random.Random) -> Worded:
    start, weekly, weeks = rng.randint(5, 40), rng.randint(2, 12), rng.randint(2, 9)
    name = rng.choice(_NAMES)
    asked = f"{name} has {start} coins and saves {weekly} more each week."
    return f"{asked} How many are there after {weeks} weeks?", start + weekly * weeks


def _sold(rng: random.Random) -> Worded:
    morning, noon = rng.randint(5, 40), rng.randint(2, 20)
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    asked = f"{name} sells {morning} {goods} in the morning and {noon} fewer than twice as many after noon."
    return f"{asked} How many in the whole day?", 3 * morning - noon


# ---------------------------------------------------------------- complex: out of reach without a machine


def _product(rng: random.Random) -> Worded:
    a, b = (rng.randint(10**7, 10**8 - 1) for _ in range(2))
    return f"What is {a} times {b}?", a * b


def _power(rng: random.Random) -> Worded:
    base, exponent, modulus = rng.randint(3, 97), rng.randint(10**3, 10**5), rng.randint(10**4, 10**6)
    return f"What is the remainder of {base}^{exponent} divided by {modulus}?", pow(base, exponent, modulus)


def _squares(rng: random.Random) -> Worded:
    last, step = rng.randint(200, 2000), rng.choice((3, 4, 6, 7, 9, 11))
    found = sum(n * n for n in range(1, last + 1) if n % step)
    return f"Add the squares of all whole numbers from 1 to {last} that {step} does not divide. What is the sum?", found


def _digits(rng: random.Random) -> Worded:
    base, exponent = rng.randint(3, 19), rng.randint(60, 300)
    return f"What is the sum of the decimal digits of {base}^{exponent}?", sum(map(int, str(base**exponent)))


def _committees(rng: random.Random) -> Worded:
    women, men, seats = rng.randint(9, 16), rng.randint(9, 16), rng.randint(6, 8)
    least = rng.randint(2, 3)
    found = sum(math.comb(women, k) * math.comb(men, seats - k) for k in range(least, seats + 1))
    asked = f"A council of {seats} is chosen from {women} women and {men} men, with at least {least} women in it."
    return f"{asked} In how many ways can that be done?", found


def _coins(rng: random.Random) -> Worded:
    coins = sorted(rng.sample((2, 3, 5, 7, 11, 13, 17, 20, 25, 50), 4))
    amount = rng.randint(150, 600)
    ways = [1] + [0] * amount
    for coin in coins:
        for sum_ in range(coin, amount + 1):
            ways[sum_] += ways[sum_ - coin]
    kinds = ", ".join(map(str, coins[:-1])) + f" and {coins[-1]}"
    return f"There are coins worth {kinds}. In how many ways can {amount} be paid, order aside?", ways[amount]


def _primes(rng: random.Random) -> Worded:
    first, span = rng.randint(10**4, 10**5), rng.randint(500, 3000)
    found = sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(first, first + span + 1))
    return f"How many prime numbers are there from {first} to {first + span}?", found


def _sequence(rng: random.Random) -> Worded:
    a, b, p, q = (rng.randint(1, 9) for _ in range(4))
    place, modulus = rng.randint(40, 200), rng.randint(10**4, 10**6)
    x, y = a, b
    for _ in range(place - 2):
        x, y = y, p * y + q * x
    asked = f"A sequence begins {a}, {b}; each next term is {p} times the last plus {q} times the one before it."
    return f"{asked} What is the remainder of term {place} divided by {modulus}?", y % modulus


SIMPLE: dict[str, Callable[[random.Random], Worded]] = {
    "change": _change, "packing": _packed, "sharing": _shared, "walking": _walked, "ages": _aged, "fences": _fenced,
    "saving": _saved, "selling": _sold,
}  # fmt: skip
COMPLEX: dict[str, Callable[[random.Random], Worded]] = {
    "long product": _product, "modular power": _power, "sum over a range": _squares, "digit sum": _digits,
    "committees": _committees, "coins": _coins, "primes": _primes, "recurrence": _sequence,
}  # fmt: skip


def generate(simple: int, complex: int, seed: int) -> list[dict]:
    """The rows of a problem file, simple ones first. The kinds take turns; no question occurs twice."""
    return [*_drawn("simple", SIMPLE, simple, seed), *_drawn("complex", COMPLEX, complex, seed)]


def _drawn(kind: str, makers: dict, count: int, seed: int) -> list[dict]:
    rng, rows, asked, names = random.Random(f"{seed} {kind}"), [], set(), list(makers)
    while len(rows) < count:
        name = names[len(rows) % len(names)]
        question, answer = makers[name](rng)
        if question not in asked:
            asked.add(question)
            rows.append({"kind": kind, "environment": name, "question": question, "answer": str(answer)})
    return rows


def run(arguments: Sequence[str]) -> None:
    """What the command line does; raises UserError."""
    values = flags.FlagValues()
    for kind in ("simple", "complex"):
        # The smallest kind of question has some hundred forms: many more would never be found.
        flags.DEFINE_integer(kind, 96, f"{kind} problems", lower_bound=0, upper_bound=1000, flag_values=values)
    flags.DEFINE_integer("seed", 0, "what they are drawn from", flag_values=values)
    flags.DEFINE_string("out", None, "problem file to write", flag_values=values)
    parse(values, arguments)
    rows, out = generate(values["simple"].value, values["complex"].value, values["seed"].value), values["out"].value
    write(Path(out), rows)
    print(f"{len(rows)} problems: {out}")


if __name__ == "__main__":
    sys.exit(command(run, __doc__, sys.argv[1:]))
