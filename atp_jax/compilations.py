"""How often XLA was asked for a program: what a long run should do at its beginning and never again."""

import jax

EVENT = "/jax/core/compile/backend_compile_duration"  # also where the persistent cache has the program


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
