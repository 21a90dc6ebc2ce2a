"""Memory that a program was given and gives back it has to be given anew, a page at a time. On a CPU, XLA takes and
gives back every temporary array; kept, and in large pages, these cost less (BENCHMARKS.md, "Memory decides").

The C library of GNU reads such settings once, when a program starts. `python -m atp_jax.memory` prints them, for what
starts otherwise: GLIBC_TUNABLES="$(python -m atp_jax.memory)" pytest.
"""

import os
import sys

NAME = "GLIBC_TUNABLES"
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
BEGUN = "ATP_MEMORY_IS_KEPT"  # between the program and itself


def keep_memory() -> None:
    """Starts this program again, under the same process id, as one that keeps its memory. To be called before anything
    else is imported, since that is lost.

    Whoever has set GLIBC_TUNABLES is left alone, and what this program starts in turn finds it unset. Another C library
    takes no notice, GNU's before 2.35 uses no large pages.
    """
    if os.environ.pop(BEGUN, ""):
        del os.environ[NAME]
    elif sys.platform == "linux" and NAME not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {NAME: KEPT, BEGUN: "yes"})


if __name__ == "__main__":
    print(KEPT)
