"""params.yaml: everything that can be set, checked at once.

Unknown keys are refused with the nearest valid one; all problems are reported together.
"""

import os
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from modelstock.errors import ParamsError, closest, few
from modelstock.files import NAME
from modelstock.merging.methods.rows import Choice, Method, Option, Sets
from modelstock.merging.methods.table import METHODS
from modelstock.merging.rules import RULES, Rule
from modelstock.tracking.tracker import TRACKERS

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
# Kinds of rows in the comparison, which a pool's name may not be.
RESERVED = ("anchor", "seed", "ensemble", "ema", "lawa", "snapshot", "longer", "periodic", *METHODS)


def _each_once(values: list[Any]) -> list[Any]:
    """A list whose values name things: twice the same name would be one thing."""
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"name each once, not {few(twice)} twice")
    return values


Once = AfterValidator(_each_once)

FILE = "a params file"  # the context of a check: defaults are for Python alone


class Section(BaseModel):
    """One section: no unknown keys, no change after reading, and no value of another type taken for the one meant.

    DVC makes names of values: the seed `true` or `1.0` would be another stage and folder than the seed 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="after")
    def _set_in_full(self, info: ValidationInfo) -> Self:
        """In a file every setting has its value: DVC compares values in params.yaml, and sees no default change."""
        absent = [n for n in type(self).model_fields if n not in self.model_fields_set and getattr(self, n) is not None]
        if info.context == FILE and absent:
            raise ValueError(f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing")
        return self


class Optimization(Section):
    """AdamW with linear warm-up, by default a cosine to zero, and gradient clipping."""

    batch_size: Positive
    lr: float = Field(gt=0, le=1)
    weight_decay: float = Field(ge=0, le=1)
    beta2: float = Field(default=0.999, ge=0.5, lt=1)
    warmup_steps: int = Field(ge=0)
    clip_norm: float = Field(gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    log_every: Positive = 5


class TinyPretraining(Optimization):
    """The embedded benchmark's tiny CLIP, pre-trained here on `draws` captioned draws."""

    source: Literal["shapes"]
    seed: Seed
    draws: Positive


class OpenClipPretraining(Section):
    """A CLIP of open_clip: the name of its config, and one of its tags, a file or folder on disk, or `random`.

    `seed`: that of random weights.
    """

    source: Literal["open_clip"]
    architecture: str = Field(min_length=1)
    pretrained: str = Field(min_length=1)
    seed: Seed = 0


class OpenClipTextPretraining(OpenClipPretraining):
    """The text tower of a CLIP of open_clip, which then classifies texts; see OpenClipPretraining.

    `length`: the most tokens of a text; null: as many as the tower takes.
    """

    source: Literal["open_clip-text"]  # type: ignore[assignment]
    length: Positive | None = None


class TransformersPretraining(Section):
    """An encoder of the library transformers, which classifies texts.

    `model`: a name on the hub, or a folder with config.json, weights and tokenizer. `pooling`: the mean over a
    text's tokens, its first token, or `pooler`, the encoder's own. `normalise`: features have length 1, as sentence
    encoders'. `length`: the most tokens of a text. `weights`: those of the model, or random ones, by `seed`.
    """

    source: Literal["transformers"]
    model: str = Field(min_length=1)
    pooling: Literal["mean", "first", "pooler"] = "mean"
    normalise: bool = True
    length: Positive
    weights: Literal["pretrained", "random"] = "pretrained"
    seed: Seed = 0


class TimmPretraining(Section):
    """A model of timm, which classifies images.

    `pretrained`: one of its tags, a file or folder on disk, or `random`, by `seed`. `size`: side of its images in
    pixels; null: as published.
    """

    source: Literal["timm"]
    model: str = Field(min_length=1)
    pretrained: str = Field(min_length=1)
    size: Positive | None = None
    seed: Seed = 0


PretrainParams = Annotated[
    TinyPretraining | OpenClipPretraining | OpenClipTextPretraining | TransformersPretraining | TimmPretraining,
    Field(discriminator="source"),
]


TEXT_SOURCES = ("open_clip-text", "transformers")  # pre-trainings of towers that take texts


class AnchorParams(Section):
    """The anchor's head, where training starts.

    `head`: prompts, zero-shot from class names and templates, by the text tower; or probe, a linear probe on the
    training split, its strength chosen on the held-out split. `scale`: of a head from prompts: the model's own
    (`logit_scale`), or fitted to the held-out split's likelihood.
    """

    head: Literal["prompts", "probe"]
    scale: Literal["model", "fitted"]


class ClassesParams(Section):
    """What the head tells apart, and the prompts of its zero-shot start.

    `names`: the class names of `shapes` or of ImageNet, a list of names (which are the folders' names too), or a
    mapping of folder to name; the order is that of the head. `templates`: those of `shapes`, OpenAI's 80 for
    ImageNet, a list of texts with {} for the name, or for each name its own texts, as many for each.
    """

    names: Literal["shapes", "imagenet"] | list[str] | dict[str, str]
    templates: Literal["shapes", "openai"] | list[str] | dict[str, list[str]]

    @field_validator("names")
    @classmethod
    def _several(cls, names: Any) -> Any:
        given = {"names": names} if isinstance(names, list) else {}
        if isinstance(names, dict):
            given = {"folders": list(names), "names": list(names.values())}
        for what, texts in given.items():
            # As a reader sees them: without outer spaces, and an accented letter in one of its two encodings.
            plain = [unicodedata.normalize("NFC", " ".join(text.split())) for text in texts]
            if len(plain) < 2 or len(set(plain)) < len(plain) or "" in plain:
                raise ValueError(f"two {what} or more, each once, none of them empty")
        return names

    @field_validator("templates")
    @classmethod
    def _placed(cls, templates: Any) -> Any:
        if isinstance(templates, list) and (not templates or any(t.count("{}") != 1 for t in templates)):
            raise ValueError("one template or more, each with one {} for the class name")
        if isinstance(templates, dict) and (
            len({len(texts) for texts in templates.values()}) != 1 or not all(templates.values())
        ):
            raise ValueError("as many texts for each name, one or more")
        return templates

    @model_validator(mode="after")
    def _of_these_names(self) -> Self:
        if isinstance(self.templates, dict):
            names = list(self.names.values()) if isinstance(self.names, dict) else self.names
            if isinstance(names, str) or sorted(names) != sorted(self.templates):
                raise ValueError(f"templates are texts of {few(list(self.templates))}, which are not the names")
        return self


class FinetuneParams(Optimization):
    """The recipe, the same for every seed.

    `micro_batch`: examples a device takes at a time; null: its whole share of the batch; auto: halved until it fits.
    `layer_decay`: learning rate of a block over that of the next. `decay`: weight decay for all parameters, as in
    WiSE-FT, or for those of two dimensions and more. `mixup`: alpha of Beta(alpha, alpha); 0: none. `rand_augment_*`:
    operations per image (0: none) and magnitude (of 30), before the crop. `train_head`: false keeps the anchor's head.
    `head_first_epochs`: epochs, before `epochs`, in which only the head learns, at `head_lr`. `devices`: processes that
    share a batch. `schedule`: of the learning rate after the warm-up. `order_seed`: of the order of the examples; null:
    the run's own seed, from which everything else is drawn. `share`: of the training examples, drawn by the seed; the
    others are not used. `ema`: decays; `lawa`: last epochs averaged (0: none); `snapshots`: every epoch's weights kept.
    Each of these averages and snapshots is scored like any weight set. `validate_every`: epochs from one measurement on
    the held-out split to the next; the last epoch is always followed by one.
    """

    epochs: Positive
    schedule: Literal["cosine", "constant"] = "cosine"
    order_seed: Seed | None = None
    share: float = Field(default=1.0, gt=0, le=1)
    micro_batch: Positive | Literal["auto"] | None = None
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    decay: Literal["all", "matrices"] = "all"
    label_smoothing: float = Field(ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    crop_scale: tuple[float, float] = Field(strict=False)  # a list in the file
    flip: bool = False
    rand_augment_operations: int = Field(default=0, ge=0)
    rand_augment_magnitude: int = Field(default=9, ge=0, le=30)
    train_head: bool = True
    head_first_epochs: int = Field(default=0, ge=0)
    head_lr: float = Field(default=1e-3, gt=0, le=1)
    gradient_checkpointing: bool = False
    compile: bool = False
    devices: Positive = 1
    ema: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Once] = []
    lawa: int = Field(default=0, ge=0)
    snapshots: bool = False
    validate_every: Positive = 1

    @model_validator(mode="after")
    def _together(self) -> "FinetuneParams":
        if self.head_first_epochs and not self.train_head:
            raise ValueError("head_first_epochs needs train_head: true")
        if self.lawa > self.epochs:
            raise ValueError(f"lawa averages {self.lawa} epochs of {self.epochs}")
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of devices {self.devices}")
        if self.mixup and self.batch_size % (2 * self.devices):
            raise ValueError(f"mixup pairs images: batch_size {self.batch_size} is odd on {self.devices} devices each")
        if self.micro_batch == "auto" and self.devices > 1:
            raise ValueError("micro_batch: auto is for one device; name a number for several")
        return self

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("two numbers with 0 < low <= high <= 1")
        return scale


# What is done to images alone, and its value in a recipe for texts. What compiling gives depends on the length of the
# first batch, and a run that goes on begins with another.
IMAGES_ALONE: dict[str, Any] = {
    "crop_scale": [1.0, 1.0],
    "flip": False,
    "rand_augment_operations": 0,
    "mixup": 0.0,
    "compile": False,
}


def images_alone(recipe: FinetuneParams) -> dict[str, Any]:
    """The settings of a recipe that texts cannot have."""
    values = recipe.model_dump(mode="json")
    return {name: values[name] for name, none in IMAGES_ALONE.items() if values[name] != none}


class VariantParams(Section):
    """One more run, by another recipe than the seeds': of a pool, whose weight sets are compared and merged together.

    `anchor`: the file of the weights that it starts from: that of all seeds, or one of `anchors`. `recipe`: what is
    other than in `finetune`.
    """

    pool: str = Field(pattern=f"^{NAME}$")
    seed: Seed
    anchor: str
    recipe: dict[str, Any]


class LoadingParams(Section):
    """How training images are read; the same bytes come out either way.

    `workers`: processes that make batches ahead per seed; 0: the training process itself, on a GPU by a thread
    where neither mixup nor RandAugment is on. `in_memory`: decoded once and kept, or read from the shards at every use.
    """

    workers: int = Field(ge=0, le=256)
    in_memory: bool


# The splits of the embedded benchmark, and what each stands for.
SHAPES_ROLES = {
    "train": "train",
    "held-out": "held-out",
    "shapes": "in-distribution",
    "shapes-v2": "shift",
    "shapes-rendition": "shift",
    "shapes-sketch": "shift",
    "shapes-adversarial": "shift",
    "shapes-objectnet": "shift",
}


class DrawnSplit(Section):
    """A split of the embedded benchmark, of this many images."""

    source: Literal["shapes"]
    images: Positive


class FilesSplit(Section):
    """Images on disk.

    `path`: a folder, a .tar, .tar.gz or .zip archive, a folder of webdataset shards (used where they are) or a folder
    of the library `datasets`. `labels`: what folders and labels mean; `classes`: the names in params, else one of the
    published layouts (modelstock.data.layouts). `role`: what a test set stands for, or held-out-shift for a shift that
    is chosen on and is no test set; `train` and `held-out` have theirs by their names. `part`: all images, or those
    that are (`held-out`) or are not (`train`) in the held-out split of `held_out_per_class` images per class.
    `devkit`: ImageNet's development kit, for labels of the flat validation set.
    `mappings`: ObjectNet's folder of that name, where it is not beside the images. `password`: of a zip archive, which
    Python decrypts slowly: unpacking it first is faster.
    """

    source: Literal["files"]
    path: str = Field(min_length=1)
    labels: str = "classes"
    role: Literal["in-distribution", "shift", "held-out-shift"] | None = None
    part: Literal["all", "train", "held-out"] = "all"
    devkit: str | None = None
    mappings: str | None = None
    password: str | None = None


class TextsSplit(Section):
    """Texts on disk, in UTF-8.

    `path`: a table (.tsv, .csv or .jsonl), a folder or archive with a folder of .txt files per class, a folder of
    webdataset shards of key.txt and key.cls (used where they are) or a folder of the library `datasets`. `text` and
    `label`: the columns of a table or of `datasets`; null for the others. `columns`: a table's columns in their order;
    null: its first line names them. `ranges`: null: a label is a class's folder or name, as classes.names has them; or
    class -> [low, high], both ends included, for a column of numbers; rows outside all ranges are left out. `labels`:
    see `FilesSplit`, and so for `role` and `part`. `duplicates`: keep all, or of texts with the same words the first by
    name, and none where their labels differ.
    """

    source: Literal["texts"]
    path: str = Field(min_length=1)
    labels: Literal["classes"] = "classes"
    text: Annotated[str, Field(min_length=1)] | None = None
    label: Annotated[str, Field(min_length=1)] | None = None
    columns: Annotated[list[str], Field(min_length=2), Once] | None = None
    ranges: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] | None = None
    role: Literal["in-distribution", "shift", "held-out-shift"] | None = None
    part: Literal["all", "train", "held-out"] = "all"
    duplicates: Literal["keep", "first"] = "keep"

    @field_validator("ranges")
    @classmethod
    def _apart(cls, ranges: dict[str, list[float]] | None) -> dict[str, list[float]] | None:
        """A number belongs to one class at most."""
        ordered = sorted((ranges or {}).items(), key=lambda item: item[1])
        wrong = [name for name, (low, high) in ordered if not low <= high]
        if wrong or (ranges is not None and len(ranges) < 2):
            raise ValueError("two classes or more, each with [low, high] and low <= high")
        for (one, (_, high)), (other, (low, _)) in pairwise(ordered):
            if low <= high:
                raise ValueError(f"the ranges of {one} and {other} overlap at {low:g}")
        return ranges

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.text is None) != (self.label is None) or (self.text is not None and self.text == self.label):
            raise ValueError("text and label name two columns, or are both null for folders and shards")
        if self.text is None and (self.columns or self.ranges):
            raise ValueError("columns and ranges are for tables: name text and label too")
        missing = [name for name in (self.text, self.label) if self.columns and name not in self.columns]
        if missing:
            raise ValueError(f"columns lacks {', '.join(map(str, missing))}")
        return self

    @property
    def rules(self) -> dict[str, Any]:
        """Everything that decides which texts a path gives, and with what labels."""
        return self.model_dump(include={"labels", "text", "label", "columns", "ranges", "duplicates"})


OnDisk = FilesSplit | TextsSplit
Split = Annotated[DrawnSplit | FilesSplit | TextsSplit, Field(discriminator="source")]


class PrepareParams(Section):
    """Every split's source, and how it becomes shards.

    `workers`: processes; they change no byte. `short_side`: null keeps files as they are; a number re-encodes images
    whose shorter side is longer than that, as JPEG of `quality`; texts are kept as they are. `held_out_per_class`: see
    `FilesSplit.part`.
    `unreadable`: the share of a split's images or texts that may be left out because they cannot be read.
    """

    seed: Seed
    shard_size: Positive
    workers: Positive = 1
    short_side: Positive | None = None
    quality: int = Field(default=95, ge=1, le=100)
    held_out_per_class: Positive = 26
    unreadable: float = Field(default=0.001, ge=0, lt=1)
    splits: dict[Name, Split]
    reference_draws: Positive
    reference_epochs: Positive

    def role(self, split: str) -> str:
        """What a split stands for: train, held-out, held-out-shift, in-distribution or shift."""
        if split in ("train", "held-out"):
            return split
        source = self.splits[split]
        if not isinstance(source, DrawnSplit):
            return source.role or "none"
        return SHAPES_ROLES[split]


class MethodParams(Section):
    """A merge method in an experiment.

    `sets`: which seeds merge together, see modelstock.experiment.subsets. Besides, every option of the method that
    `modelstock methods` lists, except that for an option chosen on the held-out split there is the list it is chosen
    from; `granularity`, where it makes a difference; `examples`: images on which statistics or gradients are measured.
    """

    sets: Sets


def _sets_of(method: Method) -> Any:
    """The sets that a method can merge: single seeds only by one that takes one, and nothing else by one of no more."""
    if method.most == 1:
        return Literal["single"]
    return Sets if method.least == 1 else Literal["ring", "pairs", "brief", "all"]


def _checked(option: Option, value: Any) -> Any:
    if not option.takes(value):
        raise ValueError(f"takes {option.expected}")
    return value


def _candidates(choice: Choice, values: list[float]) -> list[float]:
    if any(not choice.low < value <= choice.high or (choice.open_end and value == choice.high) for value in values):
        end = "below" if choice.open_end else "up to"
        raise ValueError(f"takes numbers above {choice.low:g} and {end} {choice.high:g}")
    return values


def method_section(method: Method) -> type[MethodParams]:
    """The params section of a method, from its row."""
    chosen = method.chooses
    fields: dict[str, Any] = {"sets": (_sets_of(method), ...)}
    fields |= {
        name: (Annotated[Any, AfterValidator(partial(_checked, option))], ...)
        for name, option in method.options.items()
        if name != "scale" and (chosen is None or name != chosen.option)
    }
    if method.granular:
        fields["granularity"] = (Literal["tensor", "filter", "model"], ...)
    if method.reads_examples:
        fields["examples"] = (Positive, ...)
    if chosen is not None:
        check = AfterValidator(partial(_candidates, chosen))
        fields[chosen.name] = (Annotated[list[float], Field(min_length=1), check, Once], ...)
    return create_model(f"{method.name} section", __base__=MethodParams, __doc__=method.formula, **fields)


def standard_section(method: Method) -> MethodParams:
    """The section of a method where no params file gives one."""
    values = {**method.defaults, "sets": method.sets, "granularity": "tensor", "examples": 1000}
    if method.chooses is not None:
        values[method.chooses.name] = list(method.chooses.values)
    section = method_section(method)
    return section(**{name: value for name, value in values.items() if name in section.model_fields})


class PeriodicParams(Section):
    """An arm of periodic merging: seeds that train side by side and are merged on the way.

    `rule`: what happens at a merge, a row of modelstock.merging.rules, whose options stand beside it. `size`: how many
    seeds, the first of `seeds`, with the recipe of `finetune`. `every`: epochs from one merge to the next; each comes
    at the nearest step, and one at the end. `reset_moments`: AdamW's moments start at zero after each merge.
    `devices`: 1, or one per seed.
    """

    rule: str
    size: int = Field(ge=2)
    every: float = Field(default=1.0, gt=0)
    reset_moments: bool = False
    devices: Positive = 1

    @property
    def options(self) -> dict[str, Any]:
        """The rule's options."""
        return {option.name: getattr(self, option.name) for option in RULES[self.rule].options}

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.devices not in (1, self.size):
            raise ValueError(f"devices is 1 or one per seed, not {self.devices} for size {self.size}")
        return self


def arm_section(rule: Rule) -> type[PeriodicParams]:
    """The params section of an arm with this rule, from the rule's row."""
    fields: dict[str, Any] = {
        option.name: (Annotated[Any, AfterValidator(partial(_checked, option))], option.default)
        for option in rule.options
    }
    fields["rule"] = (Literal[rule.name], ...)
    return create_model(f"{rule.name} arm", __base__=PeriodicParams, __doc__=rule.formula, **fields)


ARMS = {name: arm_section(rule) for name, rule in RULES.items()}  # by rule
if TYPE_CHECKING:
    Arm = PeriodicParams
else:
    Arm = Annotated[Union[tuple(ARMS.values())], Field(discriminator="rule")]  # noqa: UP007


class _Merge(Section):
    """The methods that run, and a section for each; one that is not named may have its section too.

    `batch_norm`: training images on which BatchNorm's running statistics are estimated again for every weight set that
    no training ended with: merges, also those that are only tried, averages along a run, periodic runs, the geometry's
    points; 0: they are averaged.
    """

    methods: Annotated[list[str], Once] = Field(min_length=1)
    batch_norm: int = Field(default=0, ge=0)

    @field_validator("batch_norm")
    @classmethod
    def _enough(cls, batch_norm: int) -> int:
        if batch_norm == 1:
            raise ValueError("takes 0, or 2 images or more: one alone has no variance")
        return batch_norm

    @model_validator(mode="after")
    def _complete(self) -> Self:
        missing = [name for name in self.methods if getattr(self, name) is None]
        if missing:
            raise ValueError(f"no section for {few(missing)}")
        plain = [name for name in self.methods if METHODS[name].recalibrates]
        if plain and not self.batch_norm:
            raise ValueError(f"{few(plain)} needs batch_norm, a number of training images")
        return self

    def section(self, method: str) -> MethodParams:
        """The section of a method that is named."""
        section: MethodParams = getattr(self, method)
        return section


def merge_section(methods: Mapping[str, Method]) -> type[_Merge]:
    """The section `merge`: one key per method of a table."""
    fields: dict[str, Any] = {name: (method_section(row) | None, None) for name, row in methods.items()}
    fields["methods"] = (Annotated[list[Literal[tuple(methods)]], Field(min_length=1), Once], ...)  # type: ignore[misc]
    return create_model("MergeParams", __base__=_Merge, __doc__=_Merge.__doc__, **fields)


if TYPE_CHECKING:
    MergeParams = _Merge
else:
    MergeParams = merge_section(METHODS)


class EvaluateParams(Section):
    """Which sets are scored; the held-out split is one of them, and the only one that anything is chosen on.

    `batch_size`: auto: one that suits the device's caches. `precision`: of the towers; heads and everything after them
    are float32; auto: bfloat16 where the machine is much faster in it, measured once. `workers`: processes that decode;
    0: the scoring process itself. `resident`: weight sets that are on the device at a time; auto: as many as fit.
    """

    benchmarks: Annotated[list[str], Once] = Field(min_length=2)
    batch_size: Positive | Literal["auto"]
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    workers: int = Field(default=0, ge=0, le=256)
    resident: Positive | Literal["auto"] = "auto"


STANDARD_ERROR = "standard-error"  # a margin


class ChampionParams(Section):
    """How the weight set to ship is chosen; see modelstock.comparison.choice.

    `rule`: nearest: of the weight sets that are not worse than the best by more than `margin` on the held-out split
    (and held-out shifts, where there are any), the one nearest to the anchor; best: the best. `margin`: standard-error,
    of the paired difference to the best, or a share: 0.005 is half a point of accuracy.
    """

    rule: Literal["nearest", "best"] = "nearest"
    margin: str | float = STANDARD_ERROR

    @field_validator("margin", mode="before")
    @classmethod
    def _margin(cls, margin: Any) -> Any:
        share = isinstance(margin, int | float) and not isinstance(margin, bool) and 0 <= margin <= 0.1
        if margin != STANDARD_ERROR and not share:
            raise ValueError(f"takes {STANDARD_ERROR} or a share from 0 to 0.1, 0.005 for half a point")
        return float(margin) if share else margin


class CompareParams(Section):
    """What intervals draw of a test set, what counts as no worse, and how the champion is chosen.

    `resample`: images one by one, or classes with all their images. `margin`: a share, 0.005 for half a point.
    """

    resample: Literal["images", "classes"]
    margin: float = Field(ge=0, le=0.5)
    champion: ChampionParams = ChampionParams()


class GeometryParams(Section):
    """Where the seeds' weights lie, and what that means for accuracy: points that are scored beside the comparison.

    `benchmarks`: of evaluate.benchmarks; none: nothing is scored for it alone. `centre`: seeds that are trained beside
    `seeds` and are in no comparison: their mean is the centre. `sizes`, `subsets`: merges of so many seeds, of so many
    subsets of each size at most. `pairs`: so many pairs of seeds are scaled by `scales` and merged at each granularity.
    `paths`: so many seeds are interpolated with the anchor by `alphas`. `plane`: coordinates, along each of the first
    two seeds' updates, of a grid. `noise`: draws of each kind around the centre. `draws`: of bootstraps. `seed`: of
    subsets, noise and bootstraps.
    """

    benchmarks: Annotated[list[str], Once] = []
    centre: Annotated[list[Seed], Once] = []
    sizes: Annotated[list[Annotated[int, Field(ge=2)]], Once] = []
    subsets: int = Field(default=0, ge=0)
    pairs: int = Field(default=0, ge=0)
    scales: Annotated[list[Annotated[float, Field(gt=0, le=4)]], Once] = []
    paths: int = Field(default=0, ge=0)
    alphas: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Once] = []
    plane: Annotated[list[Annotated[float, Field(ge=-2, le=3)]], Once] = []
    noise: int = Field(default=0, ge=0)
    draws: int = Field(default=1000, ge=100)
    seed: Seed = 0

    @model_validator(mode="after")
    def _together(self) -> "GeometryParams":
        if len(self.centre) == 1:
            raise ValueError("centre is the mean of two seeds or more")
        if self.noise and not self.centre:
            raise ValueError("noise is drawn around the centre: name its seeds in centre")
        if self.plane and not {0.0, 1.0} <= set(self.plane):
            raise ValueError("plane needs the coordinates 0.0 and 1.0, of the anchor and the seeds themselves")
        return self


class TrackingParams(Section):
    """Where runs are shown, and names there. Where MLflow is comes from MLFLOW_TRACKING_URI.

    `tracker`: mlflow, none, or another row of modelstock.tracking.tracker.TRACKERS.
    """

    tracker: str
    experiment: str = Field(min_length=1)
    model: str = Field(min_length=1)

    @field_validator("tracker")
    @classmethod
    def _known(cls, tracker: str) -> str:
        if tracker not in TRACKERS:
            raise ValueError(f"takes {' or '.join(TRACKERS)}")
        return tracker


class Params(Section):
    """The whole file.

    `seeds`: one fine-tuned weight set each. `checkpoints`: fine-tuned weights that are there already, one per seed, in
    the order of `seeds`; nothing is trained then. `anchors`: other pre-trainings that variants may start from, by name,
    as in `pretrain`; their files are models/anchors/NAME/anchor.safetensors. `variants`: runs beside the seeds, by
    name. `periodic`: name -> arm. `longer`: times the epochs of `finetune` for which the first seed trains, each a run
    of its own: what the compute of a periodic run gives without merging.
    """

    threads: Positive
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seeds: Annotated[list[Seed], Once] = Field(min_length=2)
    checkpoints: list[str] = []
    loading: LoadingParams
    classes: ClassesParams
    prepare: PrepareParams
    pretrain: PretrainParams
    anchor: AnchorParams
    anchors: dict[Name, PretrainParams]
    finetune: FinetuneParams
    variants: dict[Name, VariantParams]
    periodic: dict[Name, Arm]
    longer: Annotated[list[Annotated[int, Field(ge=2)]], Once]
    merge: MergeParams
    evaluate: EvaluateParams
    compare: CompareParams
    geometry: GeometryParams
    tracking: TrackingParams

    @field_validator("checkpoints")
    @classmethod
    def _different(cls, checkpoints: list[str]) -> list[str]:
        _each_once([os.path.realpath(path) for path in checkpoints])
        return checkpoints

    @model_validator(mode="after")
    def _splits(self) -> "Params":
        splits, wanted = self.prepare.splits, self.evaluate.benchmarks
        drawn = [name for name, split in splits.items() if isinstance(split, DrawnSplit)]
        problems = [f"prepare.splits names {_hint(n, list(SHAPES_ROLES))}" for n in drawn if n not in SHAPES_ROLES]
        problems += [f"evaluate.benchmarks names {_hint(n, list(splits))}" for n in wanted if n not in splits]
        problems += [f"prepare.splits lacks {n}" for n in ("train", "held-out") if n not in splits]
        for name, split in splits.items():
            if not isinstance(split, DrawnSplit) and (name in ("train", "held-out")) != (split.role is None):
                problems.append(f"prepare.splits.{name}.role: say it for all sets but train and held-out")
        texts = [name for name, split in splits.items() if isinstance(split, TextsSplit)]
        if 0 < len(texts) < len(splits):
            problems.append(f"prepare.splits has texts ({few(texts)}) and images: an experiment has one of them")
        if texts and self.prepare.short_side is not None:
            problems.append("prepare.short_side: null for texts")
        if not problems:
            problems += self._shared_examples()
            roles = [self.prepare.role(name) for name in wanted]
            if roles.count("held-out") != 1 or roles.count("in-distribution") != 1 or "train" in roles:
                problems.append("evaluate.benchmarks needs held-out and one in-distribution set, and no training set")
        if self.classes.names == "shapes" and len(drawn) < len(splits):
            problems.append("classes.names is shapes, but prepare.splits has files")
        if drawn and self.classes.names != "shapes":
            problems.append(f"classes.names: shapes, for the drawn splits {', '.join(drawn)}")
        seeds = len(self.seeds)
        problems += self._arms()
        if self.checkpoints and (self.periodic or self.longer):
            problems.append("periodic: {} and longer: [] where checkpoints are given, for nothing is trained")
        if self.checkpoints and self.variants:
            problems.append("variants: {} where checkpoints are given, for nothing is trained")
        if self.checkpoints and len(self.checkpoints) != seeds:
            problems.append(f"{len(self.checkpoints)} checkpoints for {seeds} seeds: name one per seed")
        problems += self._geometry_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _pools(self) -> "Params":
        """Every variant has a recipe and an anchor that there are, and a pool of one anchor."""
        known = ["models/anchor.safetensors", *(f"models/anchors/{name}/anchor.safetensors" for name in self.anchors)]
        anchors: dict[str, str] = {}
        problems = []
        for name, variant in self.variants.items():
            if variant.anchor not in known:
                problems.append(f"variants.{name}.anchor is {_hint(variant.anchor, known)}")
            if anchors.setdefault(variant.pool, variant.anchor) != variant.anchor:
                problems.append(f"variants.{name}.anchor: a pool starts from one anchor, {variant.pool} from several")
            if variant.pool in RESERVED:
                problems.append(f"variants.{name}.pool: {variant.pool!r} is what other rows are called")
            try:
                self.recipe_of(name)
            except ValidationError as error:
                problems += [f"variants.{name}.recipe: {text}" for text in _problems(error)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _modality(self) -> "Params":
        """All anchors take what the data are, and no recipe does to texts what is done to images alone."""
        of_texts = self.pretrain.source in TEXT_SOURCES
        others = [name for name, section in self.anchors.items() if (section.source in TEXT_SOURCES) != of_texts]
        wanted = "texts" if of_texts else "images"
        problems = [f"anchors.{name}.source: for {wanted}, as pretrain.source is" for name in others]
        if any(isinstance(split, TextsSplit) for split in self.prepare.splits.values()) != of_texts:
            problems.append(f"pretrain.source {self.pretrain.source} takes {wanted}, which prepare.splits are not")
        if of_texts and not self.checkpoints:
            recipes = {"finetune": self.finetune}
            recipes |= {f"variants.{name}.recipe": self.recipe_of(name) for name in self.variants}
            first = images_alone(self.finetune)
            problems += [
                f"{place}.{name}: {IMAGES_ALONE[name]} for texts (got {value})"
                for place, recipe in recipes.items()
                for name, value in images_alone(recipe).items()
                if place == "finetune" or first.get(name) != value
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def recipe_of(self, variant: str) -> FinetuneParams:
        """The whole recipe of a variant."""
        return FinetuneParams.model_validate({**self.finetune.model_dump(), **self.variants[variant].recipe})

    def _arms(self) -> list[str]:
        """Arms that want more seeds or epochs than there are, or that are another arm once more."""
        epochs, problems = self.finetune.head_first_epochs + self.finetune.epochs, []
        settings: dict[str, str] = {}
        for name, arm in self.periodic.items():
            if arm.size > len(self.seeds):
                problems.append(f"periodic.{name}.size wants {arm.size} of {len(self.seeds)} seeds")
            if arm.every > epochs:
                problems.append(f"periodic.{name}.every: at most the run's {epochs} epochs (got {arm.every:g})")
            first = settings.setdefault(arm.model_dump_json(exclude={"devices"}), name)
            if first != name:
                problems.append(f"periodic.{name} has the settings of periodic.{first}: leave one out")
        return problems

    def _geometry_problems(self) -> list[str]:
        """Points that no data, or no seeds, are there for."""
        section, benchmarks = self.geometry, self.evaluate.benchmarks
        problems = [
            f"geometry.benchmarks names {_hint(n, benchmarks)}" for n in section.benchmarks if n not in benchmarks
        ]
        if section.benchmarks and not problems:
            roles = {self.prepare.role(name) for name in section.benchmarks if name in self.prepare.splits}
            if not {"held-out", "in-distribution"} <= roles:
                problems.append("geometry.benchmarks needs held-out and the in-distribution set, or is empty")
        both = [str(seed) for seed in section.centre if seed in self.seeds]
        if both:
            problems.append(f"geometry.centre and seeds both name {', '.join(both)}: a centre is of other seeds")
        if section.centre and self.checkpoints:
            problems.append("geometry.centre: [] where checkpoints are given, for nothing is trained")
        most = {"sizes": max(section.sizes, default=0), "pairs": section.pairs, "paths": section.paths}
        seeds = len(self.seeds)
        problems += [f"geometry.{name} wants {n} of {seeds} seeds" for name, n in most.items() if n > seeds]
        return problems

    def _shared_examples(self) -> list[str]:
        """Test sets and the held-out split with training examples in them, by whatever path; so far as paths tell."""
        train = self.prepare.splits["train"]
        if self.checkpoints or isinstance(train, DrawnSplit):
            return []
        problems = []
        for name, split in self.prepare.splits.items():
            if name == "train" or isinstance(split, DrawnSplit):
                continue
            if os.path.realpath(split.path) != os.path.realpath(train.path):
                continue
            if (train.part, split.part) != ("train", "held-out"):
                problems.append(f"prepare.splits: train and {name} share a path, so each must say its part")
            elif isinstance(train, TextsSplit) and isinstance(split, TextsSplit) and split.rules != train.rules:
                problems.append(
                    f"prepare.splits: train and {name} are parts of one path, so only role and part may differ"
                )
        return problems

    def named_files(self) -> list[Path]:
        """What the file names on disk: images or texts with what belongs to them, and checkpoints."""
        names = []
        for split in self.prepare.splits.values():
            if not isinstance(split, DrawnSplit):
                names.append(split.path)
            if isinstance(split, FilesSplit):
                names += [name for name in (split.devkit, split.mappings) if name]
        if isinstance(self.pretrain, OpenClipPretraining | TimmPretraining):
            names.append(self.pretrain.pretrained)  # or a tag, which is no file
        elif isinstance(self.pretrain, TransformersPretraining):
            names.append(self.pretrain.model)
        return [Path(name) for name in (*names, *self.checkpoints)]

    def checkpoint_of(self, seed: int) -> Path | None:
        """The checkpoint that stands for a seed; None where seeds are trained."""
        return Path(self.checkpoints[self.seeds.index(seed)]) if self.checkpoints else None


def _hint(name: str, known: Sequence[str]) -> str:
    near = closest(name, known)
    return f"{name!r}" + (f" (did you mean {near!r}?)" if near else f" (known: {', '.join(known)})")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows: one, none, or its kinds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _walk(location: Sequence[int | str]) -> tuple[str, list[str]]:
    """A problem's place as the file has it, and the keys that belong beside its last one.

    Pydantic puts the kind of a section (its `source` or `rule`) and the type of a value into the place; the file has
    neither.
    """
    annotation: Any = Params
    keys: list[str] = []
    siblings: list[str] = []
    for key in location:
        sections = _sections(annotation)
        if get_origin(annotation) is dict and sections:
            annotation = get_args(annotation)[1]
        elif len(sections) > 1:
            kinds = {get_args(f.annotation): s for s in sections for f in s.model_fields.values()}
            annotation = kinds.get((key,))
            continue
        elif sections:
            siblings = list(sections[0].model_fields)
            annotation = sections[0].model_fields[str(key)].annotation if key in siblings else None
        elif annotation is not None and isinstance(key, str):
            continue
        keys.append(str(key))
    return ".".join(keys) or "the file", siblings


def _read(path: Path) -> Any:
    try:
        return YAML(typ="safe").load(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ParamsError(
            path, got=error.strerror, expected="a params file", cure="run in the repository's root"
        ) from error
    except UnicodeDecodeError as error:
        got = f"byte {error.start} that is not UTF-8"
        raise ParamsError(path, got=got, expected="text in UTF-8", cure="save it as UTF-8") from error
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        got = line + " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise ParamsError(path, got=got, expected="YAML", cure="correct this line") from error
    except (YAMLError, ValueError, RecursionError) as error:
        got = " ".join(f"{error}".split())
        raise ParamsError(path, got=got, expected="YAML", cure="correct what it names") from error


_SHOWN = reprlib.Repr()  # of a value, so much as is shown: aliases can make it endless
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 200, 200


def _problems(error: ValidationError) -> list[str]:
    """The problems of a section that the file has as a mapping of anything."""
    return [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".lstrip(": ") for problem in error.errors()]


def _refusal(path: Path, error: ValidationError, before: tuple[str, ...] = ()) -> ParamsError:
    """All problems in one line; `before`: the place of what was checked."""
    lines = []
    for problem in error.errors():
        location = (*before, *problem["loc"])
        place, siblings = _walk(location)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place} is not a setting: {_hint(str(location[-1]), siblings)}")
        elif problem["type"] == "missing":
            lines.append(f"{place} is missing")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            secret = isinstance(problem["input"], dict) or location[-1:] == ("password",)
            shown = "" if secret else f" (got {_SHOWN.repr(problem['input'])})"
            lines.append(f"{place}: {text}{shown}")
    got = f"{len(lines)} problem{'s' * (len(lines) > 1)}: " + "; ".join(lines)
    return ParamsError(path, got=got, expected="valid settings", cure="correct them")


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check a params file.

    Raises:
        ParamsError: missing file, bad YAML, or every misspelt, missing and out-of-range value in one message.
    """
    try:
        return Params.model_validate(_read(path), context=FILE)
    except ValidationError as error:
        raise _refusal(path, error) from None


def load_merge(path: Path) -> MergeParams:
    """Read and check the section `merge` of a params file; what else is in it is not looked at.

    Raises:
        ParamsError: as load_params.
    """
    raw = _read(path)
    try:
        return MergeParams.model_validate(raw.get("merge") if isinstance(raw, dict) else raw)
    except ValidationError as error:
        raise _refusal(path, error, ("merge",)) from None
