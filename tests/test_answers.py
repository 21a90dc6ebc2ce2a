r"""Final answers: found in what was said, read and compared; and hostile ones, which mean nothing and harm nobody."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.answers import LONGEST, Grader, final_answer, plain, right_answer


@pytest.fixture(scope="module")
def grader():
    found = Grader()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: 42", "42"),
        ("so it is 7.\nAnswer: 42.", "42"),
        ("answer : **42**", "42"),
        ("**Answer:** $\\frac{1}{2}$", "\\frac{1}{2}"),
        ("Answer: 1\nno, wait.\nAnswer: 2", "2"),
        ("the result is \\boxed{17}.", "17"),
        ("\\boxed{\\frac{1}{2}} and so on", "\\frac{1}{2}"),
        ("\\boxed{1}, but then \\boxed{2}", "2"),
        ("\\boxed{1}\nAnswer: 2", "2"),
        ("Answer: 2, that is \\boxed{3}", "3"),
        ("<think>Answer: 1</think>\nAnswer: 2", "2"),
        ("<think>Answer: 1</think>\nI do not know.", None),
        ("<think>Answer: 1", None),
        ("Answer:", None),
        ("Answer: \nnothing", None),
        ("\\boxed{", None),
        ("\\boxed{}", None),
        ("42", None),
        ("", None),
        ("Answer: " + "9" * (LONGEST + 1), None),
    ],
)
def test_where_the_answer_stands(text, found):
    assert final_answer(text) == found


@given(st.text(max_size=200) | st.text("answer:\\boxed{} 1\n<think></think>", max_size=80))
def test_any_text_has_an_answer_or_none(text):
    found = final_answer(text)
    assert found is None or (found == found.strip() and 0 < len(found) <= LONGEST)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.\n48+24 = 72\n#### 72", "72"),
        ("#### 1,234", "1,234"),
        ("Some steps, hence \\boxed{\\frac{3}{4}}.", "\\frac{3}{4}"),
        (" 073 ", "073"),
        ("", ""),
    ],
)
def test_the_right_answer_of_a_data_set(text, right):
    assert right_answer(text) == right


@pytest.mark.parametrize(
    ("said", "right", "same"),
    [
        ("72", "72", True), ("72.0", "72", True), ("73", "72", False), ("073", "73", True), ("-5", "5", False),
        ("1,234", "1234", True), ("\\frac{1}{2}", "0.5", True), ("0.5", "\\frac{1}{2}", True), ("1/2", "0.5", True),
        ("2/4", "1/2", True), ("1/3", "0.5", False), ("2^{10}", "1024", True), ("\\sqrt{4}", "2", True),
        ("3 \\times 10^5", "300000", True), ("42 apples", "42", True), ("$18", "18", True), ("B", "B", True),
        ("(B)", "B", True), ("A", "B", False), ("x^2+1", "1+x^2", True), ("x=5", "5", True), ("nonsense!!", "5", False),
        ("", "5", False), ("\\pi", "3.14159", False), ("10^{20}+1", "100000000000000000000", False),
    ],
)  # fmt: skip
def test_what_means_the_same(grader, said, right, same):
    assert grader.same(said, right) is same


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_plain_numbers_are_compared_as_numbers(a, b):
    grader = Grader()
    assert grader.same(f" {a}", f"{b}.0") is (a == b)
    assert grader._worker is None  # no library was needed


def test_plain_numbers_agree_with_the_library(grader):
    """The short cut says what the long way says."""
    for said, right in (("7", "7"), ("7.50", "7.5"), ("-3", "3"), ("1e3", "1000"), ("0012", "12"), ("0.1", "0.10001")):
        if said != "1e3":  # LaTeX has no such notation
            assert grader.same(said, right) is grader._asked(said, right), said
    assert plain("1e3") == 1000 and plain("1_000") is None and plain("nan") is None and plain("٣") is None


@pytest.mark.parametrize(
    "said",
    [
        "9^{9^{9^{9^9}}}", "10^{10^{10}}", "(10^8)!", "__import__('os').system('id')", "\\sum_{n=1}^{10^{12}} n^n",
        "{" * 150, "(" * 150, "\\sqrt" * 50, "\\int_0^1 x^{x^{x}} dx", "1" + "0" * 290, "\x00", "\ud800",
        "\\prod_{n=1}^{10^9} n", "e^{e^{e^{e^{e}}}}", "x" * 300,
    ],
)  # fmt: skip
def test_hostile_answers_mean_nothing(grader, said):
    assert grader.same(said, "7") is False
    assert grader.same("\\frac{14}{2}", "7") is True  # and the next is read as before


def test_the_workers_memory_is_bounded_and_a_dead_one_is_replaced(grader):
    assert grader.same("\\frac{6}{2}", "3")
    pid = grader._worker.pid
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    limit = next(line for line in limits if line.startswith("Max address space"))
    assert limit.split()[3] == str(1 << 30)
    os.kill(pid, signal.SIGKILL)
    grader._worker.wait()
    assert grader.same("\\frac{8}{2}", "4") and grader._worker.pid != pid


def test_what_a_forgotten_grader_leaves():
    grader = Grader()
    assert grader.readable("\\frac{1}{2}") and grader.readable("5") and not grader.readable("")
    worker = grader._worker
    del grader
    assert worker.poll() is not None
