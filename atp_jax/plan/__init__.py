"""What a run would need of its devices, and how fast they could be, before any of them is there.

Bytes of arrays are those that a run's own functions give their shapes; nothing of the model but its config.json (and
the adapter that it wears) is read. What is estimated is called an estimate: the intermediate values of a program, of an
update as XLA compiles it for so many CPU devices in float32, of a draw as they are counted (cost.py); and seconds,
which no program reaches: products at the chip's peak, every weight and the whole cache read once a token, links always
busy.
"""

import dataclasses
import math
from pathlib import Path

import jax

from atp_jax.errors import UserError
from atp_jax.generate.engine import CACHES
from atp_jax.models import huggingface
from atp_jax.models.config import DecoderConfig
from atp_jax.parallel import make_mesh, row_shards
from atp_jax.plan import programs
from atp_jax.plan.chips import CHIPS, USABLE, Chip
from atp_jax.plan.collectives import Collective, read_collectives
from atp_jax.plan.cost import Cost
from atp_jax.settings import AlignSettings, LoraSettings, Settings
from atp_jax.testbeds import testbed

DEPTHS = 2, 3  # layers of the programs of drawing that are made; all else is linear in the layers


@dataclasses.dataclass(frozen=True)
class Step:
    """A program of a stage, on one device: its cost, the tokens that all devices together get through in it, the bytes
    of memory it must read whatever it computes, and its collectives (None: not asked for)."""

    name: str
    tokens: int
    cost: Cost
    read: int
    dtype: str
    collectives: list[Collective] | None

    def seconds(self, chip: Chip) -> float:
        """At the chip's limits."""
        link = sum(_sent(one) for one in self.collectives or ()) / chip.link
        return max(self.cost.flops / chip.flops[self.dtype], self.read / chip.bandwidth) + link


@dataclasses.dataclass(frozen=True)
class Stage:
    """held: bytes on each device by kind, `fits`: setting -> the most that fits into free bytes of memory."""

    name: str
    work: str
    held: dict[str, int]
    steps: list[Step]
    fits: dict

    @property
    def total(self) -> int:
        return sum(self.held.values())


def prepare(devices: int) -> None:
    """So many devices of this host's processor stand in for the chips. Before jax is used for anything."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def mesh_size(settings: Settings, said: int | None) -> int:
    """How many devices: as said, else what the mesh's sizes multiply to (-1 counts as 1)."""
    sizes = settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor
    return said or math.prod(max(size, 1) for size in sizes)


def read_shape(settings: Settings) -> DecoderConfig:
    """The configuration of the run's model, of which only config.json need be there. UserError where it is not."""
    from atp_jax.model import ORGANISM

    if settings.policy.kind != "model":
        raise UserError(f"--plan is about a model, but policy.kind is {settings.policy.kind!r}")
    name = settings.policy.model or str(ORGANISM)
    if Path(name).expanduser().is_dir():
        return huggingface.load_config(Path(name).expanduser())
    return huggingface.load_config(huggingface.resolve(name, fetched=["config.json"]))


def read_adapter(settings: Settings, config: DecoderConfig) -> LoraSettings | None:
    """What the adapter is like that the run's model wears from the start; None without one. UserError where it cannot
    be read, or is another model's."""
    if not settings.policy.adapter:
        return None
    from atp_jax.models import peft

    worn = peft.load(Path(settings.policy.adapter).expanduser(), config, make_mesh(devices=jax.devices()[:1]))
    return LoraSettings(rank=len(worn.gain), targets=tuple(worn.a))


def make_plan(settings: Settings, config: DecoderConfig, mesh, collectives: bool) -> list[Stage]:
    """The stages of a run. collectives: read them from the compiled programs, those of drawing with few layers."""
    align, sampling = settings.align, settings.sampling
    prompt, context = align.dpo.max_prompt, config.max_position_embeddings
    longest = min(sampling.max_new_tokens or 256, context - prompt)
    planner = _Planner(settings, config, mesh, collectives)
    stages, methods = [], align.method.split("+")
    if "dpo" in methods:
        stages.append(planner.training("dpo", 0, align.dpo.max_length - prompt))
    if "grpo" in methods:
        new, tool = align.grpo.max_new_tokens or longest, settings.tool
        if settings.testbed == "tool_use":  # a call in each turn but the last, and what it gives back
            new = (tool.max_calls + 1) * new + tool.max_calls * tool.output
        once = settings.testbed != "tool_use" and align.grpo.rounds == 1  # members of a group go no further
        stages += planner.grpo(prompt, min(new, context - prompt), align.grpo.group if once else 1)
    bed = testbed(settings)
    episodes = len(bed.scenarios(settings)) * settings.evolve.samples
    agents = settings.game.agents if settings.testbed == "threshold_game" else 1
    rows = min(settings.policy.rows or 2**31, episodes * agents)
    stages.append(planner.sampling("evolve", rows, prompt, longest, {}))
    return stages


class _Planner:
    """Makes stages. Every program is made twice: on the mesh, where its arrays lie as in the run, and for one device
    alone with its share of the rows, heads and vocabulary, where what it computes is counted."""

    def __init__(self, settings: Settings, config: DecoderConfig, mesh, collectives: bool):
        self.align, self.config, self.mesh, self.collectives = settings.align, config, mesh, collectives
        self.dtype = settings.policy.dtype
        self.tensor, self.shards = mesh.shape["tensor"], row_shards(mesh)
        self.alone = make_mesh(devices=jax.devices()[:1])
        self.worn = read_adapter(settings, config)  # a training goes on with the adapter that is there
        trained = settings.align.lora if settings.align.method != "none" and settings.align.lora.rank else None
        self.lora = self.worn or trained

    def training(self, name: str, prompt: int, new: int, kept: dict | None = None) -> Stage:
        def made(dtype: str) -> programs.Training:
            return self._update(name, self.config, dtype, self.mesh, self.align, prompt, new)

        def counted(dtype: str, rows: int) -> Cost:
            """Of one device alone, without its gradients."""
            alone = self._update(name, self._part(), dtype, self.alone, self._share(rows), prompt, new)
            found, gradients = alone.update.cost(), _gradients(programs.device_bytes(alone.held["trained"]))
            return Cost(found.flops, max(found.temporary - gradients, 1))

        whole = made(self.dtype)
        model = self._model(self.config, self.mesh)
        held = {"parameters": programs.device_bytes(model.params)} | (kept or {})
        if self.worn:
            held["adapter"] = programs.device_bytes(model.lora)  # the reference goes on wearing it
        held |= {kind: programs.device_bytes(tree) for kind, tree in whole.held.items()}
        held["gradients"] = held["trained"]  # their sum over micro-batches

        # In bfloat16 a CPU computes in float32, on copies of the weights that no accelerator needs. So the program is
        # compiled in float32, and bfloat16 has the same share of that as where both are counted.
        compiled = made("float32").update.lower().compile()
        rows = max((self.align.rows or 0) // self.shards, whole.group)  # a prompt's answers stay together
        one, wide = counted(self.dtype, rows), counted("float32", rows)
        gradients = _gradients(held["trained"])
        temporary = max(compiled.memory_analysis().temp_size_in_bytes - gradients, 0)
        times = temporary / wide.temporary  # what is compiled, of what is counted
        held["activations"] = round(times * one.temporary) + gradients - held["gradients"]
        collectives = None
        if self.collectives:
            if self.dtype != "float32":
                compiled = whole.update.lower().compile()
            collectives = read_collectives(compiled.as_text())
        step = Step(f"{name} update", whole.answer_tokens, one, held["parameters"], self.dtype, collectives)
        # What further rows cost: far from few of them, where (all weights trained) the optimiser is the worst moment.
        many, twice = (counted(self.dtype, more * rows).temporary for more in (32, 64))
        each = max(times * (twice - many) / 32, 1)

        def fits(free: float) -> int:
            return max(0, math.floor(rows * (1 + free / each) / whole.group)) * whole.group * self.shards

        work = f"{whole.answers} answers of {new:,} tokens behind prompts of {prompt or self.align.dpo.max_prompt:,}"
        together = f"align.rows={self.align.rows or f'{rows * self.shards} at the least, as many as fit'}"
        return Stage(f"{name} update", f"{work}; {together}", held, [step], {"align.rows": fits})

    def grpo(self, prompt: int, new: int, group: int) -> list[Stage]:
        """group: answers that share their prompt while they are drawn."""
        grpo = self.align.grpo
        train = self._update("grpo", self.config, self.dtype, self.mesh, self.align, prompt, new)
        held = {kind: programs.device_bytes(tree) for kind, tree in train.held.items()}
        draw = self.sampling("grpo draw", grpo.prompts * grpo.group, prompt, new, held, group)
        # What was sampled from stays while the update runs.
        kept = {kind: size for kind, size in draw.held.items() if kind == "sampled from"}
        return [draw, self.training("grpo", prompt, new, kept)]

    def sampling(self, name: str, rows: int, prompt: int, new: int, others: dict, group: int = 1) -> Stage:
        model = self._model(self.config, self.mesh)
        found = programs.sampling(model, rows, prompt, new, group)
        held = {"parameters": programs.device_bytes(model.params)} | others
        if "trained" not in others and model.lora is not None:
            held["adapter"] = programs.device_bytes(model.lora)
        weights = programs.device_bytes(found.weights)
        trained_whole = "trained" in others and model.lora is None
        if trained_whole or self.mesh.shape["fsdp"] > 1:
            # In the dtype they are sampled in: cast where they are trained themselves, whole where they lie in slices.
            both = trained_whole and self.mesh.shape["fsdp"] > 1
            held["sampled from"] = weights + (held["parameters"] if both else 0)
        held["cache"] = programs.device_bytes(found.state)

        def made(config: DecoderConfig, mesh, rows: int) -> programs.Sampling:
            return programs.sampling(self._model(config, mesh), rows, prompt, new, group)

        steps, share = [], -(-rows // self.shards)
        for kind, tokens in (("prefill", found.tokens), ("decode", found.rows)):
            read = weights + (held["cache"] if kind == "decode" else 0)
            one = self._cost_deep(lambda config, kind=kind: getattr(made(config, self.alone, share), kind))
            step = Step(f"{name}: {kind}", tokens, one, read, self.dtype, None)
            if self.collectives:
                read_of = self._deep(lambda config, kind=kind: getattr(made(config, self.mesh, rows), kind))
                step = dataclasses.replace(step, collectives=read_of)
            steps.append(step)
        held["activations"] = max(step.cost.temporary for step in steps)
        # What waits is reckoned without sharing (Engine._most).
        each = programs.device_bytes(found.apart) / (found.rows // self.shards)

        def fits(free: float) -> int:
            return math.floor(max(0, CACHES * (free + held["cache"])) / each) * self.shards

        held_by = f"caches of {found.positions:,} positions" if found.state is found.apart else "prompts held once"
        work = f"{found.rows} rows of {prompt:,} + {new:,} tokens, {held_by}"
        return Stage(name, work, held, steps, {"rows": fits})

    def _model(self, config, mesh):
        return programs.model(config, self.dtype, mesh, self.lora)

    def _update(self, name: str, config, dtype: str, mesh, align, prompt: int, new: int) -> programs.Training:
        model = programs.model(config, dtype, mesh, self.lora)
        reference = model.lora if self.worn else None
        if name == "dpo":
            return programs.dpo(model, align, reference)
        return programs.grpo(model, align, new, prompt, reference)

    def _part(self) -> DecoderConfig:
        """What one of the devices along `tensor` computes of the model."""
        names = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
        return dataclasses.replace(self.config, **{name: getattr(self.config, name) // self.tensor for name in names})

    def _share(self, rows: int) -> AlignSettings:
        """What one device has of a step, with so many rows of a micro-batch."""
        align = self.align
        return dataclasses.replace(
            align, rows=rows, grpo=dataclasses.replace(align.grpo, prompts=-(-align.grpo.prompts // self.shards)),
            dpo=dataclasses.replace(align.dpo, batch=-(-align.dpo.batch // self.shards)),
        )  # fmt: skip

    def _cost_deep(self, make) -> Cost:
        few, more = (self._at(make, depth) for depth in DEPTHS)
        layers = (self.config.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        return Cost(
            few.flops + layers * (more.flops - few.flops),
            round(few.temporary + layers * max(more.temporary - few.temporary, 0)),
        )  # fmt: skip

    def _at(self, make, depth: int) -> Cost:
        return make(dataclasses.replace(self._part(), num_layers=depth)).cost()

    def _deep(self, make) -> list[Collective]:
        """Of the compiled program at the model's depth, from two that are less deep."""
        few, more = (
            {(c.kind, c.devices, c.in_loop): c for c in read_collectives(self._compile(make, depth))}
            for depth in DEPTHS
        )
        layers = (self.config.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        nothing = Collective("", 1, False, 0, 0)
        found = []
        for key in sorted(few.keys() | more.keys()):
            one, two = few.get(key, nothing), more.get(key, nothing)
            times, size = (round(a + layers * (b - a)) for a, b in ((one.times, two.times), (one.bytes, two.bytes)))
            found.append(Collective(*key, times, size))
        return found

    def _compile(self, make, depth: int) -> str:
        return make(dataclasses.replace(self.config, num_layers=depth)).lower().compile().as_text()


def _gradients(trained: int) -> int:
    """Bytes of gradients within an update, float32 as what is trained: their sum, and those of a micro-batch."""
    return 2 * trained


def _sent(one: Collective) -> float:
    """Bytes that a device sends, around a ring."""
    share = (one.devices - 1) / one.devices
    if one.kind == "all-reduce":
        return 2 * share * one.bytes
    if one.kind == "reduce-scatter":
        return (one.devices - 1) * one.bytes
    return share * one.bytes if one.kind in ("all-gather", "all-to-all") else one.bytes


def plan(settings: Settings, said: str) -> str:
    """The text of `--plan`. said: a chip and how many (chips.read_device), or nothing."""
    from atp_jax.plan.chips import read_device

    chip, count = read_device(said)
    config, devices = read_shape(settings), mesh_size(settings, count)
    prepare(devices)
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    stages = make_plan(settings, config, mesh, collectives=devices > 1)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    name = settings.policy.model or "the organism"
    lines = [f"{name}, {settings.policy.dtype}, {devices} device(s): {sizes}. GB are 10^9 bytes, on each device."]
    for stage in stages:
        lines += ["", f"{stage.name}: {stage.work}"]
        width = max(map(len, stage.held))
        for kind, size in stage.held.items():
            lines.append(f"  {kind:<{width}}  {size / 1e9:9.3f} GB" + ("  (estimate)" if kind == "activations" else ""))
        lines.append(f"  {'together':<{width}}  {stage.total / 1e9:9.3f} GB")
        for step in stage.steps:
            for one in step.collectives or ():
                where = "a token" if one.in_loop else "a step"
                lines.append(
                    f"  {step.name}: {one.kind} over {one.devices}: {one.times:,} {where}, {one.bytes / 1e6:,.3f} MB"
                )
        for known in (chip,) if chip else CHIPS:
            free = USABLE * known.memory - stage.total
            fit = "fits" if free >= 0 else "DOES NOT FIT"
            if free < 0 and "rows" in stage.fits and stage.fits["rows"](free):
                fit = "fits, some rows wait"  # the engine takes as many at a time as there is memory for
            most = ", ".join(f"{setting} up to {most(free):,}" for setting, most in stage.fits.items())
            rates = ", ".join(
                f"{step.name.split(': ')[-1]} {step.tokens / step.seconds(known):,.0f} tokens/s" for step in stage.steps
            )
            lines.append(f"  {known.name:<8} {fit}: {free / 1e9:+.1f} GB; {most}; at best {rates}")
    if any(step.collectives is not None for stage in stages for step in stage.steps):
        lines += ["", f"Collectives as compiled for {devices} devices of a CPU; other compilers join or split some."]
    lines += ["", f"Of a chip's memory {USABLE:.0%} counts. 'at best': the chip's peak rates and nothing waited for."]
    return "\n".join(lines)
