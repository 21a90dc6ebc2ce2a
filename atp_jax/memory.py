"""Memory that a program gives back has to be mapped anew, page by page, when it asks for it again. On a CPU, XLA takes
and gives back every temporary array; kept, and in large pages, these cost less (BENCHMARKS.md, "Memory decides").

The C library of GNU reads such settings once, when a program starts. `python -m atp_jax.memory` prints them, for what
starts otherwise: GLIBC_TUNABLES="$(python -m atp_jax.memory)" python yours.py
"""

import contextlib
import os
import sys
from importlib.machinery import ModuleSpec

NAME = "GLIBC_TUNABLES"
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
BEGUN = "ATP_MEMORY_IS_KEPT"  # between the program and itself


def keep_memory(module: ModuleSpec | None) -> None:
    """Starts this program again, under the same process id, as one that keeps its memory. To be called before anything
    else is imported, since that is lost.

    module: the `__spec__` of the one that calls. Where Python was not started with it (`-m`), but with a notebook or a
    debugger, nothing happens: these would be lost as well. Nor where GLIBC_TUNABLES is set, be it to nothing. What this
    program starts in turn finds it unset. Another C library takes no notice, GNU's before 2.35 uses no large pages.
    """
    if os.environ.pop(BEGUN, ""):
        os.environ.pop(NAME, None)
        return
    started = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    ours = module is not None and started == [module.name.removesuffix(".__main__")]
    if ours and sys.platform == "linux" and NAME not in os.environ:
        with contextlib.suppress(OSError):  # it is slower then
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {NAME: KEPT, BEGUN: "yes"})


if __name__ == "__main__":
    print(KEPT)
