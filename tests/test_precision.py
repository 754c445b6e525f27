"""What `auto` chooses: the precision that the machine is much faster in, once, and named in every result."""

import dataclasses
import json

import pytest
import torch

from modelstock.comparison.compare import compare
from modelstock.comparison.report import as_markdown
from modelstock.data.dataset import open_dataset
from modelstock.devices import FORWARD_BATCH
from modelstock.errors import DataError
from modelstock.scoring import precision
from modelstock.scoring.one_pass import score
from modelstock.scoring.precision import fastest, scoring_options, speeds
from tests.support.splits import make_split
from tests.test_comparison import ACCURACY, made


@pytest.mark.parametrize(
    ("float32", "bfloat16", "choice"), [(100, 149, "float32"), (100, 150, "bfloat16"), (100, 20, "float32")]
)
def test_bfloat16_is_chosen_where_it_is_half_as_fast_again(monkeypatch, anchor, float32, bfloat16, choice):
    monkeypatch.setattr(precision, "speeds", lambda *_, **__: {"float32": float32, "bfloat16": bfloat16})
    assert fastest(anchor, "cpu", batch_size=8, kept=None) == choice


def test_a_choice_is_measured_once_per_machine_architecture_batch_and_threads(tmp_path, monkeypatch, anchor):
    measured = []

    def slow(*_, batch_size):
        measured.append(batch_size)
        return {"float32": 1.0, "bfloat16": 9.0}

    monkeypatch.setattr(precision, "speeds", slow)
    for batch_size in (8, 8, 16):
        assert fastest(anchor, "cpu", batch_size=batch_size, kept=tmp_path) == "bfloat16"
    assert measured == [8, 16]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        fastest(anchor, "cpu", batch_size=8, kept=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert measured == [8, 16, 8]
    kept = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert kept == 3 * [{"images per second": {"float32": 1.0, "bfloat16": 9.0}, "precision": "bfloat16"}]


def test_both_precisions_are_measured(anchor, monkeypatch):
    monkeypatch.setattr(precision, "_SECONDS", 0.01)
    found = speeds(anchor, "cpu", batch_size=4)
    assert list(found) == ["float32", "bfloat16"]
    assert all(rate > 0 for rate in found.values())


def test_settings_that_are_named_are_taken_as_they_are_and_auto_is_settled(monkeypatch, anchor):
    monkeypatch.setattr(precision, "speeds", lambda *_, **__: pytest.fail("nothing to measure"))
    named = scoring_options({"batch_size": 7, "precision": "float32"}, anchor, device="cpu")
    assert (named.batch_size, named.precision, named.device) == (7, "float32", "cpu")
    monkeypatch.setattr(precision, "speeds", lambda *_, **__: {"float32": 1, "bfloat16": 2})
    auto = scoring_options({"batch_size": "auto", "precision": "auto"}, anchor, device="cpu", kept=None)
    assert (auto.batch_size, auto.precision) == (FORWARD_BATCH["cpu"], "bfloat16")


def test_bfloat16_towers_predict_nearly_what_float32_towers_do(tmp_path, anchor):
    make_split(tmp_path, "shapes", 100)
    outcomes = {}
    for name in ("float32", "bfloat16"):
        options = scoring_options({"batch_size": 50, "precision": name}, anchor, device="cpu")
        outcomes[name] = score(open_dataset(tmp_path), [anchor], options=options)[anchor.identity]
    assert (outcomes["float32"].prediction == outcomes["bfloat16"].prediction).mean() > 0.9
    assert (outcomes["float32"].nll != outcomes["bfloat16"].nll).any()


def test_results_of_two_precisions_are_not_compared_and_the_report_names_the_one():
    parts = [made(name, accuracies) for name, accuracies in ACCURACY.items()]
    half = [dataclasses.replace(one, precision="bfloat16") for one in parts]
    with pytest.raises(DataError, match="got towers in bfloat16 and float32; expected one precision"):
        compare([half[0], *parts[1:]])
    assert "Towers computed in bfloat16." in as_markdown(compare(half), {}, {})
