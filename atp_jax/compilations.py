"""How often XLA was asked for a program: what a long run should do at its beginning and never again. And how many
programs a process may hold."""

from pathlib import Path

import jax

EVENT = "/jax/core/compile/backend_compile_duration"  # also where the persistent cache has the program
# Memory mappings of a process, of which Linux allows 65,530. On a CPU a program takes up to a hundred, and the one that
# finds no room ends the process: "LLVM ERROR: Unable to allocate section memory!"
MAPPINGS, MOST = Path("/proc/self/maps"), 45_000


class Compilations:
    """A context that counts the programs compiled (or loaded from the persistent cache) since it was entered."""

    def __enter__(self) -> "Compilations":
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration: float, **about) -> None:
        self.count += event == EVENT


def make_room() -> None:
    """Lets go of all programs once they are so many that others might find no room. What is used again is loaded from
    the persistent cache, or compiled again. Looks only if a program was made since it looked last."""
    if _made.count and MAPPINGS.exists():
        _made.count = 0
        if MAPPINGS.read_bytes().count(b"\n") > MOST:
            jax.clear_caches()


_made = Compilations().__enter__()  # of this process
