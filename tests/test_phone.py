"""The model for a phone that ships: made by the recipe of the house, as small and as good as is said of it."""

import json

from edgelab import Recipe
from edgelab.bundle import coverage_of, load_bundle, read_manifest, verify_bundle
from edgelab.paths import data_dir
from edgelab.report import Report

PHONE = data_dir() / "edge-phone"


def test_it_is_whole_and_of_the_recipe_of_the_house():
    manifest = verify_bundle(PHONE)
    assert Recipe.from_json(json.dumps(manifest["recipe"])) == Recipe.phone()
    assert coverage_of(PHONE).expert_share == 1.0


def test_it_is_eight_times_smaller_and_within_five_points():
    original = sum(f.stat().st_size for f in (data_dir() / "edge-moe").glob("*.safetensors"))
    stored = sum(f.stat().st_size for f in PHONE.glob("*.safetensors"))
    assert original / stored >= 8
    report = Report.from_json(json.dumps(read_manifest(PHONE)["report"]))
    for domain in ("assistant", "arithmetic"):
        fp, phone = (report.get(model=m, metric="exact_match", slice=domain).value for m in ("fp", "phone"))
        assert phone >= fp - 0.05


def test_it_answers():
    from edgelab.evaluate import generate_answers
    from edgelab.model import load_tokenizer

    tokenizer, model = load_tokenizer(PHONE), load_bundle(PHONE)
    assert model.config.n_routed_experts == 8
    (answer,) = generate_answers(model, tokenizer, ["<|user|>turn on the kitchen light<|call|>"])
    assert json.loads(tokenizer.decode(answer, skip_special_tokens=True))["call"] == "light"
