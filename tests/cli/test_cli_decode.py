"""`tarflow tune` and `tarflow infer --decode`."""

import json

import pytest


@pytest.fixture
def plans(own_bundle):
    return own_bundle.with_name("own.plans.json")


def test_tune_writes_a_file_beside_the_bundle_that_auto_uses(tarflow, own_bundle, plans):
    tuned = tarflow("tune", own_bundle, "--batch", "1,4", "--draws", "1", "--json")
    assert tuned.code == 0, tuned.err
    report = json.loads(tuned.out)
    assert report["file"] == str(plans)
    assert report["plans"] == json.loads(plans.read_text())["plans"]
    assert [one["batch"] for one in report["plans"]] == [1, 4]
    assert "batch 4, unguided, block 0: " in tuned.err

    document = json.loads(plans.read_text())
    for one in document["plans"]:
        one["plan"] = [{"decode": "parallel", "window": 2, "tolerance": 0.001, "init": "noise"}] * len(one["plan"])
    plans.write_text(json.dumps(document))
    drawn = tarflow("infer", own_bundle, "-n", "2", "--decode", "auto", "--tolerance", "1e-5", "--json")
    assert drawn.code == 0, drawn.err
    decode = json.loads(drawn.out)["decode"]
    assert decode["asked"] == "auto"
    strategy = {"decode": "parallel", "window": 2, "tolerance": 1e-5, "init": "noise"}
    assert all(block["strategy"] == strategy for block in decode["blocks"])


def test_auto_says_when_nothing_was_tuned(tarflow, own_bundle, tmp_path):
    drawn = tarflow("infer", own_bundle, "-n", "1", "--decode", "auto")
    assert drawn.code == 0
    assert "--decode auto is sequential: own.plans.json does not exist" in drawn.err
    tarflow("tune", own_bundle, "--batch", "1", "--draws", "1", "-o", tmp_path / "my.json")
    drawn = tarflow("infer", own_bundle, "-n", "1", "--decode", "auto", "--plans", tmp_path / "my.json", "-o", "b.png")
    assert drawn.code == 0, drawn.err
    assert "--decode auto is sequential" not in drawn.err


def test_parallel_draws_the_same_pictures(tarflow, class_bundle):
    import numpy as np

    images = []
    for name, options in (("a.npy", ()), ("b.npy", ("--decode", "parallel", "--window", "2", "--tolerance", "1e-6"))):
        assert tarflow("infer", class_bundle, "-n", "3", "--seed", "5", "-o", name, *options).code == 0
        images.append(np.load(name))
    np.testing.assert_allclose(images[1], images[0], atol=5e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("--decode", "fast"),
        ("--tolerance", "1e-3"),
        ("--decode", "parallel", "--tolerance", "-1"),
        ("--decode", "parallel", "--tolerance", "nan"),
        ("--decode", "parallel", "--window", "0"),
        ("--window", "4"),
        ("--decode", "auto", "--window", "4"),
        ("--plans", "x.json"),
        ("--decode", "auto", "--plans", "missing.json"),
    ],
)
def test_options_that_contradict_are_refused(refused, class_bundle, options):
    refused("infer", class_bundle, "-n", "1", *options)


@pytest.mark.parametrize(
    "options",
    [
        ("--batch", "x"),
        ("--batch", "0"),
        ("--guidance", "-1"),
        ("--draws", "0"),
        ("--seed", "-1"),
        ("--tolerance", "nan"),
        ("--tf32",),
        ("-o", "nowhere/x.json"),
    ],
)
def test_tune_refuses_wrong_options(refused, class_bundle, options):
    assert options[0].removeprefix("--").removeprefix("-o") in refused("tune", class_bundle, *options).err


def test_a_damaged_file_of_plans_is_left_alone(refused, own_bundle, plans):
    plans.write_text("{}")
    for command in (("tune", own_bundle, "--batch", "1"), ("infer", own_bundle, "--decode", "auto")):
        refused(*command)
    assert plans.read_text() == "{}"
