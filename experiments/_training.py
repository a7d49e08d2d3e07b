"""From the config of a training run to the values that the library takes."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lminf import checkpoints
from lminf.attention.parsing import parse_policy
from lminf.attention.policy import FULL, AnyPolicy
from lminf.config import closest, from_config, parse_choice
from lminf.data import corpus, loader, windows
from lminf.data.tokenizers import ByteTokenizer, Tokenizer
from lminf.errors import InputError
from lminf.models import layer_policies, spec
from lminf.models.routers import ROUTERS
from lminf.models.spec import ModelSpec, MoESpec
from lminf.objectives import terms
from lminf.parallel import mesh, partition, pipeline
from lminf.parallel.distributed import Distributed
from lminf.run import trackers
from lminf.surgery.lora import LoRA
from lminf.train.batches import Batches, HostShard
from lminf.train.completep import CompleteP
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.train.stages import STAGES, Stage, StagedBatches, Stages
from lminf.train.step import REMAT, TrainStep
from lminf.types import Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


# Settings that another call of the same run may have otherwise: what they change is how long it is,
# where it lies and what it reports, but not what a step computes.
MAY_CHANGE = (
    "steps", "mesh", "strategy", "pipeline", "processes", "remat", "evaluate.every",
    "evaluate.sample", "checkpoint.every", "checkpoint.last", "export", "log_every", "watch",
    "profile",
)  # fmt: skip


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses settings whose harm would show only later in the run, that contradict each other, or
    that are `given` (dotted names) and read by nothing; ranges are checked before.
    """
    trackers.named(c.watch)
    known(c.not_finite, {"stop": None, "skip": None}, "not_finite")
    from_config(c.processes, Distributed)
    if c.experts.count and (c.init or c.export):
        raise InputError(
            f"--config.experts.count={c.experts.count}: models with experts are neither read nor "
            f"written in others' formats; leave out init and export"
        )
    if c.init and c.completep:
        raise InputError(
            f"--config.completep={c.completep}: a model that is trained already has multipliers of "
            f"its own; leave one of init and completep out"
        )
    if c.lora and not c.init:
        raise InputError(
            f"--config.lora={c.lora}: adapters are of a model that is there already; name it with "
            f"--config.init, or leave lora out"
        )
    for name in given if c.init else ():
        if name.startswith(("model.", "experts.")) or name == "data.tokenizer":
            raise InputError(f"--config.{name}: the model of init={c.init} has its own; leave one "
                             f"of the two out")  # fmt: skip
    for name in given if c.stages else ():
        if name in ("steps", "schedule"):
            raise InputError(
                f"--config.{name}: each of the stages has its own; leave one of the two out"
            )
    check_experts(c, given)
    mixture = experts_of(c.experts)
    if mixture is not None and not mixture.router.causal and c.evaluate.sample:
        raise InputError(
            f"--config.experts.router={c.experts.router}: experts that choose see later tokens, so "
            f"the finished model cannot write; set evaluate.sample=0"
        )
    steps_in_all = stages_of(c).steps
    if c.export and c.checkpoint.folder and Path(c.export) == Path(c.checkpoint.folder):
        raise InputError(
            f"--config.export={c.export} is also the folder of the checkpoints; name another one"
        )
    steps = [step for step in c.profile if isinstance(step, int) and 1 <= step <= steps_in_all]
    if c.profile and not (len(c.profile) == len(steps) == 2 and steps[0] <= steps[1]):
        raise InputError(
            f"--config.profile={c.profile}: give the first and the last step to trace, of the "
            f"{steps_in_all} from 1 on, as in (5,9)"
        )


def check_experts(c: ConfigDict, given: Collection[str]) -> None:
    """Refuses settings of experts where there are none, or no layer for them."""
    unread = [name for name in given if name.startswith("experts.") and name != "experts.count"]
    if unread and not c.experts.count:
        raise InputError(
            f"--config.{unread[0]}: there are no experts; give their number with "
            f"--config.experts.count, or leave it out"
        )
    if c.experts.count and c.experts.dense_layers >= c.model.num_layers:
        raise InputError(
            f"--config.experts.dense_layers={c.experts.dense_layers} of {c.model.num_layers} "
            f"layers: no layer is left for experts; give fewer"
        )


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    spec: ModelSpec
    params: Params | None  # None: fresh ones
    tokenizer: Any
    policy: AnyPolicy  # that it is trained with


def start_of(c: ConfigDict) -> Start:
    """The model to train: another's, or a new one in the shape of the config."""
    if c.init:
        loaded = checkpoints.load(c.init, dtype=jnp.float32)
        if loaded.tokenizer is None:
            raise InputError(f"{c.init} has no tokenizer; add its tokenizer.json")
        policy = policy_of(c, loaded.policy)
        return Start(loaded.spec, loaded.params, loaded.tokenizer, policy)
    tokenizer = tokenizer_of(c.data.tokenizer)
    return Start(shape_of(c, tokenizer.vocab_size), None, tokenizer, policy_of(c, None))


def policy_of(c: ConfigDict, default: AnyPolicy | None) -> AnyPolicy:
    """The policy of the config; where it names none, the model's own."""
    return parse_policy(c.attention) if c.attention else default or FULL


def tokenizer_of(name: str) -> Tokenizer | ByteTokenizer:
    if name == "bytes":
        return ByteTokenizer()
    return checkpoints.read_tokenizer(name)


def shape_of(c: ConfigDict, vocab_size: int) -> ModelSpec:
    sizes = {"vocab_size": vocab_size, "trained_length": c.data.length, **c.model.to_dict()}
    try:
        shape = spec.llama(**sizes, moe=experts_of(c.experts))
    except (ArithmeticError, ValueError) as error:  # heads that do not divide, or none
        raise InputError(f"--config.model is no shape ({error}); choose other sizes") from error
    transfer = transfer_of(c)
    return transfer.spec(shape) if transfer else shape


def transfer_of(c: ConfigDict) -> CompleteP | None:
    """The base model whose optimizer settings these are; None where they are the model's own."""
    text = c.get("completep")
    return parse_choice(text, {"completep": CompleteP}, what="parametrization") if text else None


def optimizer_of(c: ConfigDict, shape: ModelSpec) -> optax.GradientTransformation:
    """The optimizer for a learning rate of 1."""
    optimizer, transfer = parse_choice(c.optimizer, OPTIMIZERS, what="optimizer"), transfer_of(c)
    return transfer.optimizer(optimizer, shape) if transfer else optimizer.build()


def experts_of(c: ConfigDict) -> MoESpec | None:
    """The mixture in the MLP's place; None where these fields are missing or count none."""
    if c is None or not c.count:
        return None
    return MoESpec(
        experts=c.count, top_k=c.top_k, hidden_dim=c.hidden_dim, shared_dim=c.shared_dim,
        dense_layers=c.dense_layers, normalised=False, capacity_factor=None,
        router=parse_choice(c.router, ROUTERS, what="router"),
    )  # fmt: skip


def shape_to_plan(c: ConfigDict) -> ModelSpec:
    """The shape of the model to train, reading no parameters."""
    if c.init:
        return checkpoints.read_spec(c.init)
    return shape_of(c, tokenizer_of(c.data.tokenizer).vocab_size)


def stages_of(c: ConfigDict) -> Stages:
    """The stages of a run; without any, the run is one."""
    if c.stages:
        return Stages(tuple(stage_of(text) for text in c.stages))
    schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
    tokens = c.steps * c.data.batch * c.data.length
    return Stages((Stage(tokens, c.data.length, c.data.batch, schedule),))


def stage_of(text: str) -> Stage:
    """The stage that `tokens=…,length=…,batch=…,schedule=(…)` describes."""
    stage = parse_choice(f"stage:{text}", STAGES)
    choices = {name: _unwrapped(getattr(stage, name)) for name in ("plan", "transforms")}
    return dataclasses.replace(stage, **choices)


def program_of(
    c: ConfigDict, shape: ModelSpec, policy: AnyPolicy | None = None, *, absent: int | None = None
) -> TrainStep:
    """The step of this config on all devices, or planned for so many that are `absent`; of its
    first stage.
    """
    strategy = partition.parse(c.strategy)
    piped = pipeline.parse(c.pipeline) if c.pipeline else None
    strategy = strategy * partition.PIPELINE if piped else strategy
    sizes = from_config(c.mesh, mesh.MeshShape)
    laid_out = mesh.make(sizes) if absent is None else mesh.absent(sizes, absent)
    partition.check(strategy, laid_out)
    policy = policy_of(c, None) if policy is None else policy
    program = TrainStep(
        shape,
        layer_policies.by_layer(policy, windows=shape.windows, num_kv_heads=shape.num_kv_heads),
        laid_out,
        strategy,
        optimizer_of(c, shape),
        lambda step: step,  # each stage has its own
        dtype=DTYPES[known(c.dtype, DTYPES, "dtype")],
        remat=known(c.remat, REMAT, "remat policy"),
        grad_accum_steps=c.grad_accum_steps,
        clip=c.clip or None,
        objective=terms.language_modeling(shape, z_loss=c.z_loss),
        lora=parse_choice(c.lora, {"lora": LoRA}, what="adapter") if c.lora else None,
        pipeline=piped,
    )
    return stages_of(c).programs(program)[0]


def known(name: str, table: Mapping[str, Any], what: str) -> str:
    if name not in table:
        raise InputError(f"there is no {what} {name!r}; {closest(name, table)}")
    return name


@dataclass(frozen=True)
class Data:
    train: Batches  # this process's share
    shapes: tuple[tuple[int, int], ...]  # (rows, length) of every batch that may come
    held_out: list[Mapping[str, np.ndarray]]  # batches, for evaluation


def data_of(
    c: ConfigDict, tokenizer: Tokenizer | ByteTokenizer, share: HostShard, *, vocab_size: int
) -> Data:
    """Batches of the stores or texts by the plan of each stage, for a model of so many tokens; the
    end of each text is held out, in every process.
    """
    size = {"length": c.data.length, "rows": c.data.batch}
    corpora = corpus.open_corpora(c.data.path, tokenizer)
    needed = c.evaluate.batches * c.data.batch * c.data.length + 1
    corpora, held_out = corpus.hold_out(corpora, c.data.held_out, at_most=needed)
    stages = stages_of(c)
    loaders = [
        loader.Loader(
            corpora,
            loader.parse_plan(stage.plan or c.data.plan),
            length=stage.length,
            rows=stage.batch,
            seed=c.seed + index,  # of its own, or each stage would begin with the same rows
            transforms=loader.parse_transforms(
                stage.transforms or c.data.transforms, vocab_size=vocab_size
            ),
        )
        for index, stage in enumerate(stages.stages)
    ]
    return Data(
        StagedBatches(stages, [loader.Prefetched(each, **share._asdict()) for each in loaders]),
        tuple(dict.fromkeys(shape for each in loaders for shape in each.schedule.shapes)),
        windows.consecutive(held_out, at_most=c.evaluate.batches, **size),
    )


def _unwrapped(text: str) -> str:
    """A choice that stands in parentheses inside another one."""
    return text[1:-1] if text.startswith("(") and text.endswith(")") else text


def token_bytes(tokenizer: Tokenizer | ByteTokenizer) -> np.ndarray:
    """UTF-8 bytes of every token id; none of those that end documents, which are no text."""
    sizes = np.array([len(token) for token in tokenizer.token_bytes], np.int64)
    sizes[list(tokenizer.eos_ids)] = 0
    return sizes


def export_bytes(program: TrainStep) -> int:
    """Of the finished model's parameters, float32."""
    model = program.shapes.params if program.lora is None else program.shapes.frozen
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(model))


def state_bytes(program: TrainStep) -> int:
    """Of a checkpoint of the training state."""
    leaves = jax.tree.leaves(program.shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def rates_moved(c: ConfigDict, earlier_steps: int, done: int) -> str | None:
    """A warning that a run of `earlier_steps` steps gets another length after `done`, or None."""
    schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
    steps = np.arange(done)
    if np.allclose(jax.vmap(lambda s: schedule(s, earlier_steps))(steps),
                   jax.vmap(lambda s: schedule(s, c.steps))(steps), rtol=1e-6):  # fmt: skip
        return None
    rates = float(schedule(done - 1, earlier_steps)), float(schedule(done, c.steps))
    return (
        f"the learning rates of {c.schedule} depend on the number of steps: the {done} steps that "
        f"are done had those of {earlier_steps} steps, the rest have those of {c.steps} (from "
        f"{rates[0]:.3g} to {rates[1]:.3g} now), so this is not the run of {c.steps} steps"
    )


def boundaries(start: int, ends: Sequence[int], interval: int) -> Iterator[int]:
    """The multiples of `interval` after `start` and the `ends` of stages, up to the last one."""
    while start < ends[-1]:
        end = next(end for end in ends if start < end)
        start = min((start // interval + 1) * interval, end)
        yield start
