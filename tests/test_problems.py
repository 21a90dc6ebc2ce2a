"""Problems of tool use: the generator, the shipped packs, problem files and data sets, and what is wrong with them."""

import json
import math
import re
from fractions import Fraction

import pytest

from atp_jax.answers import plain
from atp_jax.errors import UserError
from atp_jax.sandbox import Sandbox
from atp_jax.scenarios import generate_problems
from atp_jax.scenarios.generate_problems import COMPLEX, SIMPLE, generate
from atp_jax.scenarios.problems import ALIGN, SHIPPED, VALIDATION, load_problems, load_source, of_kind
from atp_jax.settings import SourceSettings


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def solve(environment: str, question: str) -> int:
    """Each problem worked out from the numbers in its words alone, another way than the generator's."""
    n = numbers(question)
    if environment == "change":
        return n[2] - n[0] * n[1]
    if environment in ("packing", "saving"):
        return n[0] * n[1] + n[2] if environment == "packing" else n[0] + n[1] * n[2]
    if environment == "sharing":
        return n[1] // n[0] + n[2]
    if environment == "walking":
        return n[2] - n[0] * n[1]
    if environment == "ages":
        return sum(n)
    if environment == "fences":
        return n[0] + n[1] + n[0] + n[1]
    if environment == "selling":
        return n[0] + 2 * n[0] - n[1]
    if environment == "long product":
        return int(Fraction(n[0]) / Fraction(1, n[1]))
    if environment == "modular power":
        return n[0] ** n[1] % n[2]
    if environment == "sum over a range":
        last, step = n[1], n[2]
        whole = last * (last + 1) * (2 * last + 1) // 6
        k = last // step
        return whole - step**2 * k * (k + 1) * (2 * k + 1) // 6
    if environment == "digit sum":
        value, total = n[0] ** n[1], 0
        while value:
            value, digit = divmod(value, 10)
            total += digit
        return total
    if environment == "committees":
        seats, women, men, least = n
        few = sum(math.comb(women, k) * math.comb(men, seats - k) for k in range(least))
        return math.comb(women + men, seats) - few
    if environment == "coins":
        *coins, amount = n
        a, b, c, d = sorted(coins, reverse=True)
        return sum(
            (amount - i * a - j * b - k * c) % d == 0
            for i in range(amount // a + 1)
            for j in range((amount - i * a) // b + 1)
            for k in range((amount - i * a - j * b) // c + 1)
        )
    if environment == "primes":
        first, last = n
        sieve = bytearray([1]) * (last + 1)
        for d in range(2, math.isqrt(last) + 1):
            sieve[d * d :: d] = bytes(len(sieve[d * d :: d]))
        return sum(sieve[first:])
    assert environment == "recurrence"
    a, b, p, q, place, modulus = n
    terms = [a, b]
    while len(terms) < place:
        terms.append((p * terms[-1] + q * terms[-2]) % modulus)
    return terms[-1] % modulus


@pytest.mark.parametrize("seed", [0, 7])
def test_the_generators_answers_are_right(seed):
    """Every question's answer follows from its words alone."""
    for row in generate(64, 48, seed):
        assert str(solve(row["environment"], row["question"])) == row["answer"], row


def test_the_generator_is_a_function_of_its_seed():
    rows = generate(20, 12, 3)
    assert rows == generate(20, 12, 3) and rows != generate(20, 12, 4)
    assert [row["kind"] for row in rows] == ["simple"] * 20 + ["complex"] * 12
    assert rows[:10] == generate(10, 0, 3) and rows[20:26] == generate(0, 6, 3)  # fewer are the beginning of more
    assert {row["environment"] for row in rows} == set(SIMPLE) | set(COMPLEX)
    assert len({row["question"] for row in generate(1000, 80, 5)}) == 1080


def test_simple_is_simple_and_complex_is_not():
    for row in generate(80, 80, 11):
        size = max(*numbers(row["question"]), int(row["answer"]))
        assert size < 300 if row["kind"] == "simple" else size > 100
        assert int(row["answer"]) >= 0


def test_the_command_writes_what_the_loader_reads(tmp_path, capsys):
    out = tmp_path / "p.json"
    arguments = ["--simple=9", "--complex=8", "--seed=5", f"--out={out}"]
    assert generate_problems.command(generate_problems.run, "", arguments) == 0
    found = load_problems(str(out))
    assert [(p.question, p.answer) for p in found] == [(r["question"], r["answer"]) for r in generate(9, 8, 5)]
    assert generate_problems.command(generate_problems.run, "", ["--simple=-1", f"--out={out}"]) == 2
    assert generate_problems.command(generate_problems.run, "", []) == 2
    assert "--out=FILE is missing" in capsys.readouterr().err


def test_the_shipped_packs():
    """They are what the generator makes, hold both kinds, and no question occurs in two of them."""
    made = {str(SHIPPED): (96, 64, 0), ALIGN: (64, 192, 3), VALIDATION: (32, 32, 2)}
    questions = []
    for path, (simple, complex_, seed) in made.items():
        with open(path) as file:
            assert json.load(file) == generate(simple, complex_, seed)
        problems = load_problems(path)
        assert len(of_kind(problems, "simple", "")) == simple and len(of_kind(problems, "complex", "")) == complex_
        assert all(plain(problem.answer) is not None for problem in problems)
        questions += [problem.question for problem in problems]
    assert len(set(questions)) == len(questions)
    assert load_problems() == load_problems(str(SHIPPED))


def test_the_sandbox_can_do_what_the_complex_problems_ask():
    """Programs a model may write for the kinds that need loops and big numbers."""
    programs = {
        "digit sum": "print(sum(int(d) for d in str({0} ** {1})))",
        "modular power": "print(pow({0}, {1}, {2}))",
        "sum over a range": "print(sum(n * n for n in range({0}, {1} + 1) if n % {2}))",
        "primes": "print(sum(1 for n in range({0}, {1} + 1) if all(n % d for d in range(2, int(n ** 0.5) + 1))))",
    }
    with Sandbox() as sandbox:
        for row in generate(0, 32, 9):
            if program := programs.get(row["environment"]):
                code = program.format(*numbers(row["question"]))
                assert sandbox.run(code).text.strip() == row["answer"], code


# ---------------------------------------------------------------- files


def good(**changes):
    row = {"kind": "simple", "environment": "sums", "question": "What is 1 + 1?", "answer": "2"} | changes
    return {key: value for key, value in row.items() if value is not None}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([good(kind="hard")], "key 'kind' is 'hard'; simple or complex is expected"),
        ([good(), good(question=None)], "row 1 (from 0): key 'question' is missing"),
        ([good(answer=2)], "key 'answer' is not a text"),
        ([good(answer=" ")], "key 'answer' is empty"),
        ([3], "row 0 (from 0) is not an object"),
        ([], "at least one row"),
    ],
)
def test_a_bad_problem_file(tmp_path, rows, says):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=re.escape(says)):
        load_problems(str(path))


def test_a_file_of_one_kind_alone(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([good()]))
    with pytest.raises(UserError, match="p.json holds no complex problems"):
        of_kind(load_problems(str(path)), "complex", str(path))


# ---------------------------------------------------------------- data sets


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def lines(folder, rows, name="d.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GSM = [
    {"question": "Q1", "answer": "4 + 4 = <<4+4=8>>8\n#### 8"},
    {"question": "Q2", "answer": "a\nb\nc\n#### 1,200"},
    {"question": "Q3", "answer": "a\nb\n\nc\nd\n#### 5"},
]


def test_a_data_set_like_gsm8k(tmp_path):
    """Worked answers that end in `#### result`; steps are their lines."""
    path = lines(tmp_path, GSM)
    found, said = load_source(SourceSettings(path=path), "simple")
    assert [(p.row, p.question, p.answer, p.complex) for p in found] == [
        (0, "Q1", "8", False), (1, "Q2", "1,200", False), (2, "Q3", "5", False)
    ]  # fmt: skip
    assert said == [] and found[0].environment == "d"
    short, _ = load_source(SourceSettings(path=path, steps_most=3), "simple")
    long, _ = load_source(SourceSettings(path=path, steps_least=4), "complex")
    assert [p.question for p in short] == ["Q1", "Q2"]
    assert [p.question for p in long] == ["Q3"] and long[0].complex
    one, _ = load_source(SourceSettings(path=path, limit=1), "simple")
    assert [p.question for p in one] == ["Q1"]


def test_other_columns_and_formats(tmp_path):
    """Columns by other names, boxed solutions, lists of one answer, options to choose from, rows chosen by column."""
    rows = [
        {"problem": "P0", "solution": "so \\boxed{\\frac{1}{2}}", "field": "maths", "n": 2},
        {"problem": "P1", "solution": "\\boxed{x}", "field": "physics", "n": 1},
        {"problem": "P2", "solution": "9", "field": "maths", "n": 9},
    ]
    source = SourceSettings(path=lines(tmp_path, rows), question="problem", answer="solution", where="field=maths")
    found, _ = load_source(source, "complex")
    assert [(p.row, p.question, p.answer) for p in found] == [(0, "P0", "\\frac{1}{2}"), (2, "P2", "9")]
    source = SourceSettings(
        path=lines(tmp_path, rows), question="problem", answer="solution", where="field=maths", steps="n", steps_most=5
    )
    assert [p.row for p in load_source(source, "complex")[0]] == [0]
    chosen = [{"q": "Which?", "right": "B", "options": ["one", "two"]}]
    source = SourceSettings(path=lines(tmp_path, chosen), question="q", answer="right", options="options")
    assert load_source(source, "complex")[0][0].question == "Which?\nA) one\nB) two"
    listed = [{"question": "Q", "answer": ["$\\frac{3}{4}$"]}, {"question": "R", "answer": ["17"]}]
    assert [p.answer for p in load_source(SourceSettings(path=lines(tmp_path, listed)), "complex")[0]] == [
        "$\\frac{3}{4}$", "17"
    ]  # fmt: skip
    table = tmp_path / "t.csv"
    table.write_text("question,answer\nHow many?,12\n")
    assert load_source(SourceSettings(path=str(table)), "simple")[0][0].answer == "12"


def test_answers_that_cannot_be_read(tmp_path):
    """A few are left out, counted and listed; more than one in twenty is an error."""
    rows = [{"question": f"Q{n}", "answer": str(n)} for n in range(40)] + [{"question": "Q", "answer": ""}]
    found, said = load_source(SourceSettings(path=lines(tmp_path, rows)), "simple")
    assert len(found) == 40
    assert len(said) == 1 and "1 of 41 problems have no answer that can be read" in said[0] and "rows 40" in said[0]
    rows += [{"question": "Q", "answer": answer} for answer in ("so \\boxed{}", "x" * 400)]
    rows += [{"question": " ", "answer": "1"}]
    with pytest.raises(UserError, match=r"4 of 44 problems .* \(rows 40, 41, 42, 43\): is tool.simple.answer the"):
        load_source(SourceSettings(path=lines(tmp_path, rows)), "simple")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": "result"}, "has no column 'result', which tool.simple.answer names; it has question, answer"),
        ({"question": "text"}, "has no column 'text', which tool.simple.question names"),
        ({"steps": "hops"}, "has no column 'hops', which tool.simple.steps names"),
        ({"where": "field=maths"}, "has no column 'field', which tool.simple.where names"),
        ({"steps_least": 50}, "holds no problems that"),
        ({"where": "question=Q9"}, "holds no problems that"),
        ({"path": "nowhere.jsonl"}, "cannot be read"),
        ({"path": "README.md"}, "a file must end in .json, .jsonl, .csv, .parquet"),
    ],
)
def test_a_bad_data_set(tmp_path, monkeypatch, changes, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("words")
    source = SourceSettings(**({"path": lines(tmp_path, GSM)} | changes))
    with pytest.raises(UserError, match=re.escape(says)):
        load_source(source, "simple")


def test_a_malformed_file(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "Q", "answer": "1"}\n{"question": \n')
    with pytest.raises(UserError, match="bad.jsonl cannot be read"):
        load_source(SourceSettings(path=str(path)), "simple")
