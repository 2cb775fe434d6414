"""The methods' part of the report says what planted raw results hold, no more, and names what is missing."""

import json

import pytest

from studies.eye import lengths, shares
from studies.eye.comparing import adapters
from studies.eye.comparing.report import section

EYE = "a" * 64
COUNT = 20


def bits(share):
    """The first images right."""
    return "1" * round(share * COUNT) + "0" * (COUNT - round(share * COUNT))


def plant(
    folder,
    method,
    share,
    seed=0,
    longest=256,
    eye=EYE,
    memories=None,
    nll=2.0,
    rate=None,
    validation=False,
    rows=True,
    steps=120,
    images=None,
    look_up=0,
    text=False,
):
    trial = {"method": method, "seed": seed, "longest": longest, "rate": rate, "validation": validation, "steps": steps}
    trial |= {"lr": rate or 0.001, "parameters": 3_000_000, "train_cpu_seconds": 600.0}
    trial |= ({"batch_images": images} if images else {}) | ({"look_up_steps": look_up} if look_up else {})
    trial |= {"text": True} if text else {}
    raw = {"conditions": {"eye": eye, "trial": trial}}
    raw["language"] = [{"of": "x", "image": image, "nll": [nll, nll + 1], "right": "110"} for image in (False, True)]
    kinds = ("unseen grids", "emojione-v1")
    if rows:
        raw["rows"] = [
            {
                "images": what,
                "condition": condition,
                "length": length,
                "right": bits(share if condition == "base" else 1),
            }
            for what in kinds
            for condition in ("base", "hidden", *(["repeated"] if method == "none" else []))
            for length in lengths.LENGTHS
        ]
    if memories:
        raw["memories"] = [
            {"images": what, "memory": memory, "length": length, "right": right, "follows": follows, "said": said}
            for what in kinds
            for memory, (right, follows, said) in memories.items()
            for length in (0, 1024)
        ]
    more = f"-{steps}" * (steps != 120) + f"-{images}" * bool(images) + "-look" * bool(look_up) + "-text" * text
    name = f"{method}-{longest}-{seed}-{eye[0]}{rate or ''}{validation}{more}.json"
    (folder / "methods").mkdir(exist_ok=True)
    (folder / "methods" / name).write_text(json.dumps(raw))


READ = {
    "own": ("1" * 15 + "0" * 5, "0" * 20, ["A cat."] * 10 + ["A dog"] * 10),
    "other": ("0" * 20, "1" * 20, ["A fish."] * 20),
    "noise": ("0" * 20, "0" * 20, ["A dog"] * 20),
    "off": ("0" * 20, "0" * 20, ["A dog"] * 20),
}
"""A look-up: of 15 right answers 10 differ from those without it, of 5 wrong ones none, of 20 misled ones all."""


def answer(lines, question):
    """Its cells, by training; none where it was not run."""
    (at,) = [number for number, line in enumerate(lines) if line.startswith(f"**{question}")]
    if "*not run*" in lines[at]:
        return {}
    table = lines[at + 4 : lines.index("", at + 2)]
    return {cells[1].strip(): " | ".join(cells[2:-1]).strip() for cells in (line.split("|") for line in table)}


def test_nothing_run_is_told_and_nothing_else(tmp_path):
    lines = section(tmp_path, "cpu", EYE)
    asked = [line for line in lines if line.startswith("**") and line[2:].split("**")[0].endswith("?")]
    assert len(asked) > 10
    assert all("*not run*" in line for line in asked)
    assert not any(line.startswith("|") for line in lines)
    (missing,) = [line for line in lines if line.startswith("Not run:")]
    assert "sft up to 2,048" in missing


def test_planted_differences_are_found(tmp_path):
    plant(tmp_path, "none", 0.25)
    for seed in range(3):
        plant(tmp_path, "lora", 0.5 + 0.05 * seed, seed)
        plant(tmp_path, "lora", 0.5, seed, longest=2048)
        plant(tmp_path, "pvm-warm", 0.9, seed, memories=READ, nll=2.5)
    plant(tmp_path, "pvm", 0.3, memories=dict.fromkeys(READ, READ["off"]))
    lines = section(tmp_path, "cpu", EYE)
    text = "\n".join(lines)
    assert "| lora up to 256 (3 seeds) | 55 %" in text
    assert "| the eye itself, hidden | 100 %" in text
    assert "| 3.0 M | 10.0 |" in text
    told = "*not shown*, +0.0 points [+0.0, +0.0] (one seed)"
    assert answer(lines, "With a pretrained language model") == {"pvm up to 256": f"{told}  |  {told}"}
    assert answer(lines, "And with the warm-up?")["pvm-warm up to 256"].startswith("*yes*, +75.0 points")
    better = answer(lines, "Does PVM read better than lora?")["pvm-warm up to 256"]
    assert better.startswith("*yes*, +35.0 points [")
    assert better.count("(3 seeds)") == 2
    assert answer(lines, "Does PVM read better than sft?") == {}
    assert answer(lines, "Was it the unfamiliar text")["lora up to 256"].startswith("*yes*, +30.0 points")
    repeated = answer(lines, "And better than the image repeated")
    assert repeated["pvm-warm up to 256"].startswith("*not shown*, -10.0 points")
    assert repeated["lora up to 256"].startswith("*the contrary*, -45.0 points")
    longer = answer(lines, "Does training on long narrations")
    assert list(longer) == ["lora up to 2,048"]
    assert longer["lora up to 2,048"].startswith("*not shown*, -5.0 points")
    named = answer(lines, "Does another image's memory")
    assert named["pvm up to 256"].startswith("*not shown*, +0.0")
    assert named["pvm-warm up to 256"].startswith("*yes*, +100.0")
    notice = answer(lines, "Could a check")
    assert notice["pvm-warm up to 256"] == "67 % of 180  |  0 % of 60  |  100 % of 240"
    assert notice["pvm up to 256"] == "none  |  0 % of 80  |  none"
    stays = answer(lines, "Does the language stay?")
    assert stays["lora up to 256"].startswith("*no loss shown*, +0.000 nats")
    half = "*no*, +0.500 nats [+0.500, +0.500] (3 seeds)"
    assert stays["pvm-warm up to 256"] == f"{half}  |  {half}"
    named = [line for line in lines if line.startswith("| pvm-warm up to 256 (3 seeds) | other |")]
    assert [line.endswith("| 100.0 % |") for line in named] == [True, True]


def test_another_number_of_steps_is_a_row_of_its_own(tmp_path):
    plant(tmp_path, "none", 0.25)
    plant(tmp_path, "lora", 0.5)
    plant(tmp_path, "pvm-warm", 0.25, memories=dict.fromkeys(READ, READ["off"]))
    plant(tmp_path, "pvm-warm", 0.9, seed=1, longest=2048, memories=READ, steps=600)
    lines = section(tmp_path, "cpu", EYE)
    formed = answer(lines, "And with the warm-up?")
    assert formed["pvm-warm up to 256"].startswith("*not shown*, +0.0")
    assert formed["pvm-warm up to 2,048 in 600 steps"].startswith("*yes*, +75.0")
    better = answer(lines, "Does PVM read better than lora?")
    assert list(better) == ["pvm-warm up to 256"]
    assert better["pvm-warm up to 256"].count("*the contrary*, -25.0") == 2
    longer = "pvm-warm up to 2,048 in 600 steps"
    plant(tmp_path, "lora", 0.5, seed=1)  # where nothing was trained as long, the shorter training is the rival
    better = answer(section(tmp_path, "cpu", EYE), "Does PVM read better than lora?")
    assert better[longer].count("*yes*, +40.0 points") == 2
    plant(tmp_path, "lora", 0.7, seed=1, longest=2048)  # one of fewer steps at the same lengths comes first
    better = answer(section(tmp_path, "cpu", EYE), "Does PVM read better than lora?")
    assert better[longer].count("*yes*, +20.0 points") == 2
    plant(tmp_path, "lora", 0.75, seed=1, longest=2048, steps=600)
    better = answer(section(tmp_path, "cpu", EYE), "Does PVM read better than lora?")
    assert better[longer].count("*not shown*, +15.0 points") == 2
    assert longer not in answer(lines, "Does training on long narrations")


def test_what_is_of_another_eye_or_chooses_settings_is_left_out(tmp_path):
    plant(tmp_path, "lora", 0.5, eye="b" * 64)
    plant(tmp_path, "sft", 0.5, rate=1e-3)
    assert "Learning rates were not tuned." in section(tmp_path, "cpu", EYE)[0]
    plant(tmp_path, "mlp", 0.5, validation=True)
    plant(tmp_path, "mlp", 0.75, rate=0.01, validation=True)
    lines = section(tmp_path, "cpu", EYE)
    assert not any(line.startswith("|") for line in lines)
    assert "mlp 0.002, pvm 0.002" in lines[0]
    assert "mlp up to 256: 0.001 50 %, 0.01 75 %." in lines[0]
    assert "Left out, since they are of another eye: lora-256-0-bFalse.json." in lines
    assert any(line.startswith("| lora up to 256 (1 seed) |") for line in section(tmp_path, "cpu", "b" * 64))


def test_a_measurement_that_was_stopped_is_not_run(tmp_path):
    plant(tmp_path, "none", 0.25)
    plant(tmp_path, "pvm-warm", 0.9, rows=False)
    lines = section(tmp_path, "cpu", EYE)
    assert answer(lines, "And with the warm-up?") == {}
    assert "*no loss shown*" in answer(lines, "Does the language stay?")["pvm-warm up to 256"]


def test_the_languages_own_raw_result_is_what_methods_are_held_against(tmp_path):
    plant(tmp_path, "sft", 0.5, nll=3.0)
    rows = [
        {"of": of, "image": image, "nll": [nll, nll + 1], "right": "111"}
        for of, image, nll in (("SmolLM2", False, 1.0), ("the eye", False, 1.5), ("the eye", True, 1.0))
    ]
    (tmp_path / "language-cpu.json").write_text(json.dumps({"rows": rows}))
    lines = section(tmp_path, "cpu", EYE)
    assert any(line.startswith("| SmolLM2 | 4.5 | -0.500 nats") for line in lines)
    stays = answer(lines, "Does the language stay?")["sft up to 256"]
    assert "+1.500 nats [+1.500, +1.500] (one seed)  |  *no*, +2.000" in stays


def test_a_gap_takes_the_wider_interval():
    same_images = shares.gap({0: [1.0, 1.0], 1: [3.0, 3.0]}, {0: [0.0, 0.0], 1: [0.0, 0.0]})
    assert (same_images.mean, same_images.seeds) == (2.0, 2)
    assert same_images.high - same_images.mean == pytest.approx(12.7062, abs=1e-3)  # t of one degree of freedom
    same_seeds = shares.gap({0: [1.0, 3.0], 1: [1.0, 3.0]}, {0: [0.0, 0.0], 1: [0.0, 0.0]})
    assert same_seeds.high == pytest.approx(same_images.high)
    assert shares.gap({0: [1.0]}, {1: [1.0]}) is None
    longer = shares.gap({0: [1.0, 3.0, 99.0]}, {0: [0.0, 0.0]})
    assert (longer.mean, longer.seeds) == (2.0, 1)
    assert shares.share({0: "1100", 1: "1110"}).startswith("62 % [")


def test_another_number_of_steps_or_images_is_a_row_of_its_own(tmp_path):
    plant(tmp_path, "none", 0.5)
    plant(tmp_path, "pvm-warm", 0.25)
    plant(tmp_path, "pvm-warm", 0.5, images=2, seed=1)  # the default, told: the same row as where it is not
    plant(tmp_path, "pvm-warm", 0.75, steps=1200)
    plant(tmp_path, "pvm-warm", 1.0, steps=1200, images=8)
    plant(tmp_path, "pvm-warm", 1.0, look_up=1200)
    plant(tmp_path, "pvm-warm", 1.0, look_up=1200, text=True)
    found = section(tmp_path, "cpu", EYE)
    for name in (
        "up to 256 (2 seeds)",
        "up to 256 in 1,200 steps (1 seed)",
        "up to 256 in 1,200 steps of 8 images (1 seed)",
        "up to 256, after 1,200 steps of look-up (1 seed)",
        "up to 256, after 1,200 steps of look-up, with text beside (1 seed)",
    ):
        assert [line for line in found if line.startswith(f"| pvm-warm {name} |")], name


def test_an_adapter_is_told_with_what_its_memory_and_another_images_do(tmp_path):
    assert adapters.section(tmp_path) == []

    def row(memory, length, right, named, follows):
        return {"memory": memory, "length": length, "right": right, "named": named, "follows": follows, "said": []}

    rows = [row("never", 0, "1111", "1111", "----"), row("never", 512, "1000", "1000", "----")]
    rows += [row("short", 0, "1111", "1111", "0000"), row("short", 512, "0000", "1111", "0000")]
    rows += [row("short, other", 0, "-111", "-111", "-000"), row("short, other", 512, "-000", "-001", "-110")]
    cost = {"steps": 30, "seconds": 1500.0}
    for name, more in (("earlier", {}), ("stage1", {"training": cost})):
        raw = {"conditions": {"adapter": name, **more}, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(raw))
    told = adapters.section(tmp_path)
    assert "`earlier`, by tokens of narration:" in told
    assert "`stage1` (30 steps of rewards; 25 minutes in all), by tokens of narration:" in told
    assert "| short | 100 % of 4 | 0 % of 4 (named: 100 %) |" in told
    assert "| short, other | 100 % of 3 | 0 % of 3 (named: 33 %) |" in told
    near, line = [line for line in told if line.startswith("- ")][:2]
    assert "names with short against never at 0: +0.0 [" in near
    assert "names with short against never at 512: +75.0 [" in line
    assert "own against another image's: +66.7 [" in line
    assert line.endswith("what it alone shows is named in 67 %")
