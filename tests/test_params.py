"""params.yaml: every problem is reported at once, with the nearest valid key."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.compose import text_of
from modelstock.errors import ParamsError
from modelstock.params import load_params
from tests.support.settings import full_params

ROOT = Path(__file__).parent.parent
ARMS = text_of("methods", ROOT / "conf").partition("\nperiodic:")[2].partition("\nlonger:")[0]  # as the file has them


def changed(tmp_path, *changes: tuple[str, str]) -> Path:
    text = full_params()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "params.yaml").write_text(text)
    return tmp_path / "params.yaml"


def test_the_projects_own_file_is_valid():
    params = load_params(ROOT / "params.yaml")
    assert params.seeds == list(range(8))
    assert params.finetune.lr == 1e-3


def test_the_checkpoints_stand_for_the_seeds_in_their_order(tmp_path):
    path = changed(
        tmp_path,
        ("seeds: [0, 1, 2, 3, 4, 5, 6, 7]", "seeds: [7, 3]"),
        ("checkpoints: []", "checkpoints: [a.pt, b.pt]"),
        ("longer: [2]", "longer: []"),
        (ARMS, " {}"),
    )
    path.write_text(re.sub(r"variants:.*?\n\n", "variants: {}\n\n", path.read_text(), flags=re.DOTALL))
    params = load_params(path)
    assert [params.checkpoint_of(seed) for seed in (3, 7)] == [Path("b.pt"), Path("a.pt")]
    assert load_params(ROOT / "params.yaml").checkpoint_of(0) is None


def test_all_problems_are_reported_at_once_with_the_nearest_key(tmp_path):
    path = changed(
        tmp_path,
        ("label_smoothing: 0.0", "label_smoothin: 0.0"),
        ("draws: 75000", "draws: 0"),
        ("uniform: {sets: ring}", "uniform: {sets: rings}"),
    )
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    message = str(caught.value)
    assert "4 problems" in message
    assert "finetune.label_smoothin is not a setting: 'label_smoothin' (did you mean 'label_smoothing'?)" in message
    assert "finetune.label_smoothing is missing" in message
    assert "pretrain.draws: Input should be greater than or equal to 1 (got 0)" in message
    assert "merge.uniform.sets: Input should be 'ring', 'pairs', 'brief', 'all' or 'single' (got 'rings')" in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "shapes-v2, shapes-r",
            "shapes-v3, shapes-r",
            "evaluate.benchmarks names 'shapes-v3' (did you mean 'shapes-v2'",
        ),
        ("benchmarks: [held-out, ", "benchmarks: [", "evaluate.benchmarks needs held-out"),
        ("    train: {source: shapes, images: 1500}\n", "", "prepare.splits lacks train"),
        ("    shapes-v2: {", "    shapes-v3: {", "prepare.splits names 'shapes-v3' (did you mean 'shapes-v2'"),
        (
            "{source: shapes, images: 4000}",
            "{source: shapes, image: 4000}",
            "prepare.splits.shapes.image is not a setting: 'image' (did you mean 'images'?)",
        ),
        ("{source: shapes, images: 4000}", "{source: shape, images: 4000}", "prepare.splits.shapes: Input tag 'shape'"),
        (
            "{source: shapes, images: 4000}",
            "{source: files, path: a, labels: classes, part: all}",
            "classes.names is shapes, but",
        ),
        (
            "{source: shapes, images: 1500}",
            "{source: files, path: a, labels: classes, part: all, role: shift}",
            "prepare.splits.train.role",
        ),
        ("names: shapes", "names: [a, b]", "classes.names: shapes, for the drawn splits train, held-out"),
        ("names: shapes", "names: [a, a]", "two names or more, each once"),
        ("names: shapes", "names: [a, 'a ']", "two names or more, each once"),
        ("names: shapes", "names: [great  owl, great owl]", "two names or more, each once"),
        ("names: shapes", 'names: ["caf\\xe9", "cafe\\u0301"]', "two names or more, each once"),
        ("names: shapes", "names: [a, '']", "none of them empty"),
        ("names: shapes", "names: {n1: a, 'n1 ': b}", "two folders or more, each once"),
        ("templates: shapes", "templates: [a photo]", "each with one {} for the class name"),
        ("source: shapes # or open_clip", "source: open_clip", "pretrain.architecture is missing"),
        ("checkpoints: []", "checkpoints: [a.pt]", "1 checkpoints for 8 seeds: name one per seed"),
        ("[model_stock, uniform,", "[model_stok, uniform,", "merge.methods.0: Input should be 'model_stock'"),
        ("seeds: [0, 1, 2, 3, 4, 5, 6, 7]", "seeds: [0, 0]", "seeds: name each once, not 0 twice"),
        ("seeds: [0, 1, 2, 3, 4, 5, 6, 7]", "seeds: [true, 0]", "seeds.0: Input should be a valid integer (got True)"),
        ("seeds: [0, 1, 2, 3, 4, 5, 6, 7]", "seeds: [1.0, 0]", "seeds.0: Input should be a valid integer (got 1.0)"),
        ("shapes, shapes-v2,", "shapes, shapes,", "evaluate.benchmarks: name each once, not shapes twice"),
        ("[model_stock, uniform,", "[uniform, uniform,", "merge.methods: name each once, not uniform twice"),
        ("longer: [2]", "longer: [2, 2]", "longer: name each once, not 2 twice"),
        ("longer: [2]", "longer: [1]", "longer.0: Input should be greater than or equal to 2"),
        ("ema: [0.99]", "ema: [0.99, 0.99]", "finetune.ema: name each once, not 0.99 twice"),
        ("density: 0.2, scales: [0.4,", "density: 0.2, scales: [0.4, 0.4,", "merge.ties.scales: name each once"),
        ("checkpoints: []", "checkpoints: [a.pt, ./a.pt]", "checkpoints: name each once"),
        (
            "density: 0.2, scales: [0.4,",
            "density: 1.2, scales: [0.4,",
            "merge.ties.density: takes a number from 0 to 1 (got 1.2)",
        ),
        ("  flip: false\n", "", "finetune: flip is missing"),
        ("device: auto # a GPU where there is one\n", "", "the file: device is missing"),
        ("crop_scale: [0.9, 1.0]", "crop_scale: [1.0, 0.9]", "two numbers with 0 < low <= high <= 1"),
        ("lr: 1.0e-3", "lr: 2", "finetune.lr: Input should be less than or equal to 1"),
        ("threads: 2", "threads: 0", "threads: Input should be greater than or equal to 1"),
        ("lawa: 5", "lawa: 15", "finetune: lawa averages 15 epochs of 12"),
        (
            "compile: false\n  devices: 1",
            "compile: false\n  devices: 3",
            "batch_size 64 is not a multiple of devices 3",
        ),
        (
            "train_head: true\n  head_first_epochs: 0",
            "train_head: false\n  head_first_epochs: 1",
            "head_first_epochs needs train_head: true",
        ),
        ("micro_batch: null", "micro_batch: half", "finetune.micro_batch: Input should be 'auto'"),
        ("mixup: 0.0", "mixup: -1", "finetune.mixup: Input should be greater than or equal to 0"),
        ("ema: [0.99]", "ema: [1.0]", "finetune.ema.0: Input should be less than 1"),
        ("{rule: warp, size: 2", "{rule: warp, size: 9", "periodic.warp.size wants 9 of 8 seeds"),
        ("every: 0.4348", "every: 12.5", "periodic.papa.every: at most the run's 12 epochs (got 12.5)"),
        ("every: 0.4348", "every: 0", "periodic.papa.every: Input should be greater than 0"),
        ("alpha: 0.99", "alpha: 1.5", "periodic.papa.alpha: takes a number from 0 to 1 (got 1.5)"),
        ("alpha: 0.99", "alfa: 0.99", "periodic.papa.alfa is not a setting: 'alfa' (did you mean 'alpha'?)"),
        ("toward: last", "toward: seed", "periodic.warp.toward: takes anchor or last (got 'seed')"),
        ("pull: 0.5, ", "", "periodic.warp: pull is missing"),
        ("rule: papa", "rule: pappa", "periodic.papa: Input tag 'pappa'"),
        ("  papa: {", "  pa.pa: {", "periodic.pa.pa: String should match pattern"),
        ("{rule: papa, size: 2, every: 0.4348, alpha: 0.99,", "{rule: papa, size: 2, alpha: 0.99,", "every is missing"),
        (
            "  papa: {rule: papa, size: 2, every: 0.4348, alpha: 0.99,",
            "  twin: {rule: warp, size: 2, every: 1.0, pull: 0.5, toward: last,",
            "periodic.twin has the settings of periodic.warp: leave one out",
        ),
        (
            "toward: last, reset_moments: false, devices: 1",
            "toward: last, reset_moments: false, devices: 3",
            "devices is 1 or one per seed, not 3 for size 2",
        ),
        ("checkpoints: []", "checkpoints: [a.pt, b.pt]", "periodic: {} and longer: [] where checkpoints are given"),
        ("checkpoints: []", "checkpoints: [a.pt, b.pt]", "variants: {} where checkpoints are given"),
        ("constant-0: {pool: constant-rate", "constant-0: {pool: uniform", "'uniform' is what other rows are called"),
        (
            "constant-0: {pool: constant-rate",
            "Constant 0: {pool: constant-rate",
            "variants.Constant 0.[key]: String should match",
        ),
        (
            "recipe: {schedule: constant}",
            "recipe: {shedule: constant, lr: 7}",
            "variants.constant-0.recipe: lr: Input should be less than or equal to 1; "
            "variants.constant-0.recipe: shedule: Extra inputs are not permitted",
        ),
        (
            "pool: constant-rate, seed: 0, anchor: models/anchor.safetensors",
            "pool: constant-rate, seed: 0, anchor: models/anchors/week/anchor.safetensors",
            "(did you mean 'models/anchors/weak/anchor.safetensors'?)",
        ),
        (
            "pool: constant-rate, seed: 0, anchor: models/anchor.safetensors",
            "pool: constant-rate, seed: 0, anchor: models/anchors/weak/anchor.safetensors",
            "a pool starts from one anchor, constant-rate from several",
        ),
    ],
)
def test_each_bad_value_is_named(tmp_path, old, new, message):
    with pytest.raises(ParamsError) as caught:
        load_params(changed(tmp_path, (old, new)))
    assert message in str(caught.value)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"threads: \xe9", "got byte 9 that is not UTF-8; expected text in UTF-8"),
        ("threads: 2".encode("utf-16"), "got byte 0 that is not UTF-8"),
        (b"threads: 2\nseeds: []\nthreads: 3\n", 'line 3: .*duplicate key "threads"'),
        (b"threads:\n\t- 1\n", "line 2: .*cannot start any token"),
        (b"threads: 2001-99-99", "month must be in 1..12"),
        (b"a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        (b"a: 1\n---\nb: 2\n", "line 2: .*found another document"),
        (b"- 1", r"the file: Input should be a valid dictionary .*\(got \[1\]\)"),
        (b"", r"\(got None\)"),
        ((BOMB + "seeds: *a39\n").encode(), "seeds.0: Input should be a valid integer"),
    ],
)
def test_whatever_the_file_holds_it_is_refused_in_one_short_line(tmp_path, content, message):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ParamsError, match=message) as caught:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 10_000


def test_a_wrong_password_is_not_repeated(tmp_path):
    split = "{source: files, path: a, labels: classes, part: all, role: shift, password: 1234567}"
    with pytest.raises(ParamsError, match="password: Input should be a valid string") as caught:
        load_params(changed(tmp_path, ("{source: shapes, images: 4000}", split)))
    assert "1234567" not in str(caught.value)


def test_a_missing_file_and_bad_yaml_are_one_line(tmp_path):
    with pytest.raises(ParamsError, match="got No such file or directory; expected a params file"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(ParamsError, match="expected YAML") as caught:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["held-out", "photos"])
@pytest.mark.parametrize("path", ["images/train", "./images//train", "link"])
def test_training_images_are_not_tested_on_by_whatever_path_they_are_named(tmp_path, monkeypatch, name, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "link").symlink_to("images/train")
    yaml = YAML(typ="safe")
    raw = yaml.load(full_params())
    files = {"source": "files", "labels": "classes", "part": "all"}
    raw["prepare"]["splits"] = {
        "train": {**files, "path": "images/train"},
        "held-out": {**files, "path": "images/held-out"},
        "photos": {**files, "path": "images/test", "role": "in-distribution"},
    }
    raw["evaluate"]["benchmarks"] = ["held-out", "photos"]
    raw["classes"] = {"names": ["a", "b"], "templates": ["a {}"]}

    def load() -> None:
        with open("params.yaml", "w") as file:
            yaml.dump(raw, file)
        load_params(Path("params.yaml"))

    load()
    raw["prepare"]["splits"][name]["path"] = path
    with pytest.raises(ParamsError, match=f"train and {name} share a path, so each must say its part"):
        load()
    raw["prepare"]["splits"]["train"]["part"], raw["prepare"]["splits"][name]["part"] = "train", "held-out"
    load()
