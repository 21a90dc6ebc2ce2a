"""What the stages of a run share: the wording, and the base model with the sampling in force."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import SamplingSettings, Settings

if TYPE_CHECKING:  # a scripted run starts without what a model needs
    from atp_jax.model import Model


@dataclasses.dataclass(frozen=True)
class Lab:
    """A scripted run has no model, and nothing is sampled."""

    wording: dict
    model: "Model | None" = None
    sampling: Sampling | None = None


def sampling_in_force(settings: SamplingSettings, generation: dict) -> Sampling:
    """What the settings leave open (null) is taken from the model's `generation_config.json`, else from no truncation
    at temperature 1; a model that says `do_sample: false` is greedy. `max_new_tokens` is 256 if neither gives it."""
    own = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 256}
    own |= {name: generation[name] for name in own if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        own["temperature"] = 0.0
    given = {name: value for name in own if (value := getattr(settings, name)) is not None}
    return Sampling(**(own | given))


def open_lab(settings: Settings) -> Lab:
    """Loads the base model and finds the sampling in force."""
    wording = load_wording(settings.wording, settings.testbed)
    if settings.policy.kind == "scripted":
        return Lab(wording)
    from atp_jax import parallel
    from atp_jax.model import load_model

    chosen, mesh = settings.policy, settings.mesh
    mesh = parallel.make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    model = load_model(chosen.model, dtype=chosen.dtype, mesh=mesh, adapter=chosen.adapter)
    sampling = sampling_in_force(settings.sampling, model.generation)
    if settings.testbed == "tool_use":
        from atp_jax.tools import convention_of

        wording = wording | {"convention": convention_of(model.tokenizer)}
        if wording["convention"] == "fenced":
            print("note: the model's chat template has no tool calling: the tool is called by a fenced block of Python")
    print("sampling:", ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sampling).items()))
    return Lab(wording, model, sampling)


def aligned(base: "Model", directory: Path) -> "Model":
    """A model that alignment left: the base with an adapter, or weights of its own."""
    from atp_jax.model import load_model
    from atp_jax.models import peft

    if not directory.is_dir():
        raise UserError(f"there is no {directory}: run the stage {directory.name} first")
    if (directory / "adapter_config.json").exists():
        return dataclasses.replace(base, lora=peft.load(directory, base.config, base.mesh))
    return load_model(directory, dtype=str(base.dtype), mesh=base.mesh)
