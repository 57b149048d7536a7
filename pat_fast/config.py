"""Configurations of the pruner and of the training job: validated, versioned, and closed to unknown keys.

:func:`load_config` is the way in. Whatever is wrong with a configuration ends in one
:class:`~pat_fast.errors.ConfigError` that lists every problem as ``key.path: expected ..., got ...``.
Each field's ``description`` is the "expected" of that message and the field's documentation at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import AliasChoices, Field, model_validator

from .errors import ConfigError, did_you_mean
from .reading import TARGET_NAMES, Section, load_config, parse_overrides, refuse, refused

__all__ = ["PruneConfig", "TrainConfig", "load_config", "parse_overrides"]

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
BUILT_IN_DATA = ("digits", "image_folder")
# Keys of the data section that have no meaning for a source, and are refused there.
FOREIGN_TO_DATA = {
    "digits": ("root", "channels", "mean", "std", "args"),
    "image_folder": ("args",),
    "factory": ("root", "size", "channels", "mean", "std", "test_fraction", "val_fraction", "split_seed"),
}


class PruneConfig(Section):
    """What to prune, how much and when: the keyword arguments of :class:`pat_fast.Pruner`."""

    version: Literal[1] = Field(default=1, description="the configuration version 1")
    target_sparsity: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        validation_alias=AliasChoices(*TARGET_NAMES),
        description="a number in [0, 1): the share of channels to remove",
    )
    schedule: str | dict[str, Any] = Field(
        default="cubic",
        description="a schedule: a name such as 'linear' or 'cubic', or an object with 'name' and options",
    )
    unit: Literal["epoch", "step"] = Field(
        default="epoch", description="'epoch' or 'step': what start_epoch, end_epoch and interval count"
    )
    mode: str | dict[str, Any] = Field(
        default="prune",
        description="'prune' (shrink at every step), 'mask' (hold at zero until finalize()), 'soft', 'hybrid', or an "
        "object with 'name' and options",
    )
    ranking: str | list[list[str]] = Field(
        default="global",
        description="'global' (across layers), 'local' (the same share of each), 'isomorphic' (of each kind), or lists "
        "of layer names that are ranked together",
    )
    start_epoch: int = Field(default=0, ge=0, description="an integer >= 0: the epoch after which pruning starts")
    end_epoch: int | None = Field(
        default=None, ge=0, description="an integer >= start_epoch (when the target is reached) or null"
    )
    interval: int = Field(default=1, ge=1, description="an integer >= 1: epochs from one prune to the next")
    target: dict[str, float] | None = Field(
        default=None,
        description="an object with one of 'channels', 'params', 'macs', 'latency', 'latency_ms' (and 'batch'), "
        "instead of target_sparsity, or null",
    )
    mac_target: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="a number in (0, 1] (the share of MACs at which to stop) or null",
    )
    round_to: int | Literal["auto"] | dict[str, int] | None = Field(
        default=None,
        description="an integer >= 1 (channel counts stay multiples of it), 'auto', an object with one for each type "
        "of layer, or null",
    )
    layer_ratios: dict[str, float] | None = Field(
        default=None, description="an object with the share of channels to remove for each layer name, or null"
    )
    max_ratio: float | dict[str, float] = Field(
        default=1.0,
        description="a number in [0, 1] (the share of its channels that a layer may lose), or one for each layer name",
    )
    min_channels: int = Field(default=1, ge=1, description="an integer >= 1: channels that every layer keeps")
    layers_to_prune: list[str] | None = Field(
        default=None, min_length=1, description="a list of one or more layer names, or null for every layer"
    )
    ignored_layers: list[str] | None = Field(default=None, description="a list of layer names, or null")
    importance: str | dict[str, Any] = Field(
        default="group_norm",
        description="a criterion: a name such as 'group_norm' or 'taylor', or an object with 'name' and options",
    )
    p: float | None = Field(
        default=None, gt=0, description="a number > 0 (the exponent of a magnitude) or null for the criterion's own"
    )
    regularizer: str | dict[str, Any] | None = Field(
        default="group_norm",
        description="'group_norm', 'bn_scale', 'growing', 'proximal', an object with 'name' and options, or null",
    )
    stability: dict[str, Any] | None = Field(
        default=None, description="an object with options of pat_fast.Stability, or null"
    )
    reg_strength: float = Field(default=1e-4, ge=0, description="a number >= 0: the strength of the regulariser")

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_the_target(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.keys() >= set(TARGET_NAMES):
            raise refuse(
                "global_sparsity",
                "only one of target_sparsity and global_sparsity, which are two names of one setting; "
                f"got {data['target_sparsity']!r} and {data['global_sparsity']!r}",
            )
        return data

    @model_validator(mode="after")
    def _end_after_start(self) -> PruneConfig:
        if self.end_epoch is not None and self.end_epoch < self.start_epoch:
            raise refuse("end_epoch", f"an integer >= start_epoch, which is {self.start_epoch}; got {self.end_epoch}")
        return self

    @model_validator(mode="after")
    def _parts_can_be_made(self) -> PruneConfig:
        from .arguments import make_regularizer
        from .criteria import make_criterion
        from .limits import Rules
        from .modes import make_mode
        from .schedules import OneShot, make_curve
        from .stability import Stability
        from .targets import Goal, Target

        default = type(self).model_fields["target_sparsity"].default
        rules = (self.ranking, self.round_to, self.min_channels, self.layer_ratios, self.max_ratio)
        parts: list[tuple[tuple[str, ...], Callable[[], Any]]] = [
            (("ranking", "round_to", "layer_ratios", "max_ratio"), lambda: Rules(*rules)),
            (
                ("mac_target", "layer_ratios", "target"),
                lambda: Goal(Target.of(self.target, self.target_sparsity, default), self.mac_target, Rules(*rules)),
            ),
            (("regularizer",), lambda: make_regularizer(self.regularizer, self.reg_strength)),
            (("mode",), lambda: make_mode(self.mode)),
            (("stability",), lambda: Stability.of(self.stability)),
            (("p", "importance"), lambda: make_criterion(self.importance, self.p)),
            (("schedule",), lambda: make_curve(self.schedule)),
        ]
        for keys, make in parts:
            try:
                made = make()
            except ConfigError as error:
                key = next((k for k in keys if str(error).startswith(f"{k}: ")), keys[-1])
                raise refused(key, error) from None
        if isinstance(made, OneShot) and self.end_epoch not in (None, self.start_epoch):
            raise refuse("end_epoch", f"null with 'one_shot', which prunes at start_epoch; got {self.end_epoch}")
        return self

    def pruner_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of :class:`pat_fast.Pruner` that this configuration stands for."""
        return self.model_dump(exclude={"version"})


class ModelConfig(Section):
    """The network: a callable that returns an ``nn.Module``, from ``[B, ...]`` to logits ``[B, classes]``."""

    factory: str = Field(description="'package.module:callable'")
    args: dict[str, Any] = Field(default_factory=dict, description="an object: keyword arguments of the factory")

    @model_validator(mode="after")
    def _factory_has_two_parts(self) -> ModelConfig:
        if not FACTORY.fullmatch(self.factory):
            raise refuse("factory", f"'package.module:callable'; got {self.factory!r}")
        return self


class AugmentConfig(Section):
    """Random changes of the training images, drawn anew for each batch."""

    shift: int = Field(default=0, ge=0, description="an integer >= 0: pixels an image may move along each axis")
    flip: bool = Field(default=False, description="true or false: mirror half of the images left to right")


class DataConfig(Section):
    """The images and how they are split. ``args`` belongs to a factory, ``root`` to ``image_folder``."""

    name: str = Field(default="digits", description="'digits', 'image_folder' or 'package.module:factory'")
    root: str | None = Field(default=None, description="a folder with one sub-folder of images per class")
    size: int | None = Field(default=None, ge=4, description="an integer >= 4: height and width in pixels, or null")
    channels: Literal[1, 3] | None = Field(default=None, description="1 (grey) or 3 (colour), or null")
    mean: list[float] | None = Field(default=None, description="a list with one number per channel, or null")
    std: list[float] | None = Field(default=None, description="a list with one number per channel, or null")
    args: dict[str, Any] = Field(default_factory=dict, description="an object: keyword arguments of the factory")
    batch_size: int = Field(default=64, ge=1, description="an integer >= 1")
    test_fraction: float = Field(default=0.25, gt=0, lt=1, description="a number in (0, 1): the share held out")
    val_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="a number in [0, 1): the share that accuracy is followed on, or 0",
    )
    split_seed: int = Field(default=0, ge=0, description="an integer >= 0: the seed of the split")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="an object with 'shift' and 'flip'")
    workers: int = Field(default=0, ge=0, description="an integer >= 0: processes that load data")

    @model_validator(mode="after")
    def _keys_belong_to_the_source(self) -> DataConfig:
        if self.name not in BUILT_IN_DATA and not FACTORY.fullmatch(self.name):
            got = f"{self.name!r}{did_you_mean(self.name, BUILT_IN_DATA)}"
            raise refuse("name", f"'digits', 'image_folder' or 'package.module:factory'; got {got}")
        if self.name == "image_folder" and not self.root:
            raise refuse("root", "a folder with one sub-folder of images per class; got nothing")
        foreign = FOREIGN_TO_DATA.get(self.name, FOREIGN_TO_DATA["factory"])
        for key in foreign:
            value = getattr(self, key)
            # Equal to the default passes, so that a written-out configuration can be read again.
            if value != type(self).model_fields[key].get_default(call_default_factory=True):
                raise refuse(key, f"no such key with the data {self.name!r}; got {value!r}")
        if self.test_fraction + self.val_fraction >= 1:
            raise refuse(
                "val_fraction",
                "test_fraction + val_fraction below 1, so that something is left to train on; "
                f"got {self.test_fraction} + {self.val_fraction}",
            )
        return self

    @model_validator(mode="after")
    def _normalisation_fits(self) -> DataConfig:
        channels = self.channels or 3
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and len(value) != channels:
                raise refuse(key, f"{channels} numbers, one per channel; got {value!r}")
        if self.std is not None and min(self.std) <= 0:
            raise refuse("std", f"numbers above 0; got {self.std!r}")
        return self


class OptimizerConfig(Section):
    """The optimizer; ``momentum`` and ``nesterov`` belong to SGD, ``betas`` to Adam and AdamW."""

    name: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="'sgd', 'adam' or 'adamw'")
    lr: float = Field(default=0.1, gt=0, description="a number > 0: the learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="a number >= 0")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="a number in [0, 1)")
    nesterov: bool = Field(default=False, description="true or false")
    betas: list[float] = Field(default=[0.9, 0.999], description="a list of two numbers in [0, 1)")

    @model_validator(mode="after")
    def _keys_belong_to_the_optimizer(self) -> OptimizerConfig:
        foreign = ("betas",) if self.name == "sgd" else ("momentum", "nesterov")
        for key in foreign:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise refuse(key, f"no such key with the optimizer {self.name!r}; got {value!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise refuse("betas", f"a list of two numbers in [0, 1); got {self.betas!r}")
        if self.nesterov and self.momentum == 0:
            raise refuse("nesterov", "a momentum above 0 beside it; got momentum 0")
        return self

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the ``torch.optim`` class that ``name`` stands for."""
        shared = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.name == "sgd":
            return shared | {"momentum": self.momentum, "nesterov": self.nesterov}
        return shared | {"betas": tuple(self.betas)}


class SchedulerConfig(Section):
    """The learning rate over the run, as a factor on the optimizer's ``lr``; updated at every batch."""

    name: Literal["none", "cosine", "step"] = Field(default="cosine", description="'none', 'cosine' or 'step'")
    warmup_epochs: float = Field(default=0.0, ge=0, description="a number >= 0: epochs of linear rise from zero")
    final_factor: float = Field(
        default=0.0, ge=0, le=1, description="a number in [0, 1]: the factor at which cosine ends"
    )
    milestones: list[int] = Field(default=[], description="a list of epochs at which step multiplies by gamma")
    gamma: float = Field(default=0.1, gt=0, le=1, description="a number in (0, 1]")

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> SchedulerConfig:
        if self.name == "step" and not self.milestones:
            raise refuse("milestones", "one or more epochs with the scheduler 'step'; got []")
        return self


class TrainConfig(Section):
    """One run of ``pat-fast train``."""

    version: Literal[1] = Field(default=1, description="the configuration version 1")
    name: str = Field(default="run", pattern=r"^[\w.-]+$", description="a name of letters, digits, '.', '_' and '-'")
    title: str | None = Field(default=None, description="a line of text for the plot and the table, or null")
    model: ModelConfig = Field(description="an object with 'factory' and 'args'")
    data: DataConfig = Field(default_factory=DataConfig, description="an object with 'name' and its options")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="an object with 'name', 'lr' and the optimizer's options"
    )
    scheduler: SchedulerConfig = Field(
        default_factory=SchedulerConfig, description="an object with 'name' and the scheduler's options"
    )
    epochs: int = Field(ge=1, description="an integer >= 1")
    seed: int = Field(default=0, ge=0, description="an integer >= 0")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="'auto', 'cpu' or 'cuda'")
    threads: int | None = Field(default=None, ge=1, description="an integer >= 1: CPU threads, or null")
    pruning: PruneConfig | None = Field(default=None, description="an object (a pruning configuration) or null")
    dense_twin: bool = Field(default=True, description="true or false: also train the same network without pruning")
    latency_batch: int | None = Field(
        default=None, ge=1, description="an integer >= 1: images per measured forward, or null for batch_size"
    )
    output_dir: str = Field(default="runs", min_length=1, description="the folder that run folders are made in")
