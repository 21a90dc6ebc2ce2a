"""The process that reads and compares mathematical answers for `answers.py`. A script of its own: it imports nothing of
this package, and ends when nobody asks any more.

Lines of JSON in: `[text]` (can it be read?) or `[said, right]` (do they mean the same?). Lines out: `ready` once, then
`true` or `false`.
"""

import json
import resource
import sys

MEMORY = 1 << 30  # bytes of address space


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import math_verify
    from math_verify import LatexExtractionConfig

    def read(text: str) -> list:
        # Only the LaTeX reader: the other one hands what it finds to Python's own parser.
        return math_verify.parse(
            f"\\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=3
        )

    def answered(texts: list[str]) -> bool:
        found = [read(text) for text in texts]
        if not all(found):
            return False
        # The right answer comes first: its form decides how the other is read.
        return len(found) == 1 or bool(math_verify.verify(found[1], found[0], timeout_seconds=3))

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            reply = answered(json.loads(line))
        except Exception:  # whatever a grammar and an algebra system trip over
            reply = False
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
