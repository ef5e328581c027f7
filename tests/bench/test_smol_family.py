"""The second family's scripts at a tiny size: its split, its encoding, its training, its scores."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FAMILY = Path(__file__).parents[2] / "bench" / "family"
CHARACTERS = "0123456789+=/: \nabcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The scripts import each other as modules beside them."""
    added = [str(FAMILY / "smol"), str(FAMILY), str(FAMILY.parent)]
    sys.path[:0] = added
    yield
    for entry in added:
        sys.path.remove(entry)


def make_tokenizer(*specials: str) -> PreTrainedTokenizerFast:
    """One token for each character, as SmolLM2 has for digits and signs."""
    vocabulary = {"<pad>": 0} | {character: i + 1 for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    fast.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *specials]}
    )
    return fast


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def encoder(scripts: None) -> Any:
    from worksheets import Encoder

    return Encoder(make_tokenizer("<image>"))


def test_held_out_pairs_are_in_no_training_example(encoder: Any) -> None:
    import worksheets

    tests = {tuple(pair) for pair in worksheets.pairs_of("test").tolist()}
    trains = {tuple(pair) for pair in worksheets.pairs_of("train").tolist()}
    assert len(tests) + len(trains) == 90 * 90 and not tests & trains
    assert {(b, a) for a, b in tests} == tests, "an order must not leak the other"
    text = make_tokenizer("<image>").decode
    for step in range(20):
        batch = worksheets.worksheet_batch(encoder, 36, 0, 1, step)
        for row in batch.ids.tolist():
            for line in text(row).replace("<|im_start|>", "").replace("<pad>", "").split("\n"):
                a, b = line.split("=")[0].split("+")
                assert (int(a), int(b)) in trains


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(10, 99), st.integers(10, 99)), min_size=1, max_size=4))
def test_a_worksheet_asks_for_results_and_for_nothing_else(pairs: list[tuple[int, int]]) -> None:
    from worksheets import IGNORED, Encoder

    tokenizer = make_tokenizer()
    ids, labels = Encoder(tokenizer).worksheet(pairs)
    written = "\n".join(f"{a}+{b}={a + b}" for a, b in pairs)
    whole = tokenizer("<|im_start|>" + written + "<|im_end|>")["input_ids"]
    assert ids == whole[:-1]
    asked = [(t, label) for t, label in enumerate(labels) if label != IGNORED]
    assert all(whole[t + 1] == label for t, label in asked)
    said = tokenizer.decode([label for _, label in asked])
    assert said == "\n".join(str(a + b) for a, b in pairs) + "<|im_end|>"


def test_no_result_is_taught_with_a_picture(encoder: Any) -> None:
    from worksheets import IGNORED, picture_batch

    decode = make_tokenizer("<image>").decode
    batch = picture_batch(encoder, 64, 0, 2, 0)
    assert batch.pixels is not None and batch.pixels.shape == (64, 3, 32, 32)
    assert (batch.ids == encoder.ids("<image>")[0]).sum(dim=1).tolist() == [4] * 64
    taught = [decode(row[row != IGNORED].tolist()) for row in batch.labels]
    sums = [answer for answer in taught if "=" in answer]
    assert 5 < len(sums) < 40 and all(answer.endswith("=") for answer in sums)
    assert all(answer.endswith("<|im_end|>") for answer in taught if "=" not in answer)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(encoder: Any, tmp_path: Path) -> None:
    from grow import only_moving
    from tuning import Stage, answer_loss, tune
    from worksheets import worksheet_batch

    stage = Stage(4, 1e-2, 6, warmup=1, log_every=1)

    def trained(stops: bool) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
        model, state = make_base(), tmp_path / f"{stops}.state"

        def loss_at(step: int) -> torch.Tensor:
            return answer_loss(model, worksheet_batch(encoder, 6, 0, 1, step))

        if stops:
            points = tune(only_moving(model), stage, loss_at, state, resume=False, until=0.0)
            assert [point["step"] for point in points] == [1]
            model = make_base()
        return model, tune(only_moving(model), stage, loss_at, state, resume=stops)

    start = make_base().state_dict()
    (unbroken, points), (broken, resumed) = trained(False), trained(True)
    assert [point["step"] for point in resumed] == [1, 2, 3, 4]
    assert [p["loss"] for p in points] == [p["loss"] for p in resumed]
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, broken.state_dict()[name])
        moved = not torch.equal(weight, start[name])
        assert moved == ("_proj" in name), f"{name}: only what is in scope may move"


def test_the_score_is_what_generation_says(encoder: Any) -> None:
    """On an untrained model's own answers, so that right ones exist at all."""
    from forced import Problem, problems, score

    model = make_base()
    digits = [token for digit in "0123456789" for token in encoder.ids(digit)]
    asked, expected, ended = [], 0, 0
    for number, problem in enumerate(problems("text_sums", encoder, 24, seed=0)):
        ids, labels = problem.row
        prompt = ids[: next(t for t, label in enumerate(labels) if label >= 0) + 1]
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            told = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=3,
                do_sample=False,
                eos_token_id=None,
            )[0, len(prompt) :].tolist()
        wrong = number % 3 == 0
        wanted = [(told[0] + 1) % 30, told[1]] if wrong else told[:2]
        row = [*prompt, *wanted], [-100] * (len(prompt) - 1) + [*wanted, 0]
        asked.append(Problem(row))
        ended += told[2] in digits
        expected += not wrong and told[2] not in digits
    assert 0 < expected
    assert score(model, encoder, asked)["right"].correct == expected


def test_the_mllm_starts_as_its_base(encoder: Any) -> None:
    from sight import in_scope, make_mllm
    from worksheets import picture_batch

    base = make_base()
    base.config.bos_token_id = base.config.eos_token_id = base.config.pad_token_id = 0
    mllm = make_mllm(base).eval()
    assert mllm.lm_head.weight is mllm.model.language_model.embed_tokens.weight
    assert mllm.config.image_token_id == encoder.ids("<image>")[0]
    ours, theirs = in_scope(mllm), in_scope(base)
    assert len(ours) == 14 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = picture_batch(encoder, 3, 0, 2, 0)
    seen = mllm(input_ids=batch.ids, pixel_values=batch.pixels).logits
    unseen = mllm(input_ids=batch.ids, pixel_values=-batch.pixels).logits
    assert not torch.allclose(seen[:, 5:], unseen[:, 5:]), "the picture must matter"


def test_the_anatomy_tells_what_was_planted() -> None:
    from anatomy import anatomy, silenced

    generator = torch.Generator().manual_seed(0)

    def orthonormal(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q

    left, right, other = orthonormal(40, 3), orthonormal(60, 4), orthonormal(40, 2)
    first = left @ torch.diag(torch.tensor([4.0, 2.0, 1.0]).double()) @ right[:, :3].T
    # The expert's first direction leans 60 degrees off the MLLM's; its second is the MLLM's third.
    leaning = 0.5 * right[:, 0] + math.sqrt(0.75) * right[:, 3]
    second = 8 * torch.outer(other[:, 0], leaning) + 2 * torch.outer(other[:, 1], right[:, 2])
    base = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    facts = anatomy(base, base + first, base + second, right[:, 3])
    assert facts["s"][:2] == pytest.approx([0.5, 0.0], abs=1e-9)
    assert facts["s_max_at"] == 1 and facts["s_max"] == pytest.approx(0.5)
    assert facts["lambda_full"] == pytest.approx(7 / 10)
    assert facts["energy"]["mllm"] == pytest.approx(
        {"1": 16 / 21, "4": 1, "16": 1} | {"64": 1, "256": 1}
    )
    assert facts["input"] == pytest.approx({"mllm": 0, "expert": math.sqrt(0.75)}, abs=1e-9)
    assert facts["gap"] == pytest.approx({"mllm": 0.5, "expert": 0.75})
    assert facts["subspace"] == pytest.approx(1.0), "the MLLM's third is the expert's second"
    assert facts["inside"]["1"] == pytest.approx(0.25 * 64 / 68)
    assert facts["inside"]["4"] == pytest.approx((0.25 * 64 + 4) / 68)
    gamma = 1 / (1 + math.exp(-32 * 0.5))
    assert facts["update"]["softmax 32"] == pytest.approx(gamma**2 * 4 / math.sqrt(68), rel=1e-6)
    assert facts["update"]["relative 8"] == pytest.approx(4 / math.sqrt(68), rel=1e-3)

    still = torch.randn(80, 60, generator=generator, dtype=torch.float64)
    norms = torch.ones(60)
    norms[7], still[:, 7] = 0.01, 1e-6
    other = torch.randn(80, 60, generator=generator, dtype=torch.float64)
    assert silenced(norms, (still, still * 2)) == {
        "at": [7, 7],
        "ends_there": True,
        "weight": pytest.approx(0.01),
    }
    other[:, 9] = 0
    facts = silenced(norms, (still, other))
    assert facts["at"] == [7, 9] and not facts["ends_there"]


@pytest.fixture(scope="module")
def grown(scripts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of the tiny base, hardly trained."""
    from grow import grow_expert, grow_mllm, save
    from tuning import Stage

    folder = tmp_path_factory.mktemp("family")
    base = make_base()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(base.config, name, 0)
    base.generation_config = GenerationConfig()
    save(base, folder / "base", make_tokenizer())
    stage = Stage(2, 3e-3, 6, warmup=1, log_every=1)
    grow_expert(folder, 0, stage, resume=False)
    grow_mllm(folder, 0, stage, sight=(2, 2), resume=False)
    return folder


@pytest.fixture
def family(grown: Path) -> Any:
    from merging import SmolFamily

    return SmolFamily(grown, problems=6)


def test_merges_are_lean_merges_own(family: Any) -> None:
    """Task Arithmetic against plain sums, and IP-Merging from the analysis against one without."""
    from merging import _taken

    from lean_merge import stream

    whole = family.merged("task_arithmetic", scale=1.0)
    assert whole.keys() == family.base.keys() and len(whole) == 14
    for name, weight in whole.items():
        error = weight - family.mllm[name] - family.of_expert[name]
        assert error.norm() < 2**-8 * family.of_expert[name].norm(), "a difference in bf16"
    for options in ({"threshold": 0.0}, {"threshold": 0.2, "stages": ("select", "rescale")}):
        merged = family.merged("ip_merging", **options)
        alone = _taken(stream(family.recipe("ip_merging", **options)))
        changed = 0
        for name, weight in alone.items():
            torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=1e-6)
            changed += not torch.equal(weight, family.mllm[name])
        assert changed > 0


def test_marks_tell_what_was_right(encoder: Any) -> None:
    """A model that knows every answer but those to some questions, token by token."""
    from types import SimpleNamespace

    from forced import Exam, marks, problems

    asked = problems("picture_sums", encoder, 6, seed=0)
    wrong = {0: None, 1: 0, 2: 5, 3: 6, 4: -2, 5: -1}  # which token of the answer it misses
    answers = [[label for label in problem.row[1] if label >= 0] for problem in asked]
    said = [list(answer) for answer in answers]
    for number, place in wrong.items():
        if place is not None:
            said[number][place] = encoder.ids(
                "9" if said[number][place] != encoder.ids("9")[0] else "8"
            )[0]
    flat = torch.tensor([token for answer in said for token in answer])
    size = len(make_tokenizer("<image>"))

    def states(**inputs: torch.Tensor) -> Any:
        # As wide as the vocabulary, so that the head is the identity: the first choice is `said`.
        hidden = torch.zeros(*inputs["input_ids"].shape, size)
        labelled = [[label >= 0 for label in problem.row[1]] for problem in asked]
        places = [
            (i, j) for i, row in enumerate(labelled) for j, is_asked in enumerate(row) if is_asked
        ]
        for (i, j), token in zip(places, flat.tolist(), strict=True):
            hidden[i, j, token] = 1.0
        return SimpleNamespace(last_hidden_state=hidden)

    model = SimpleNamespace(model=states, lm_head=lambda each: each)
    found = {kind: mark.right.tolist() for kind, mark in marks(model, encoder, asked).items()}
    assert found == {
        "right": [True, False, False, False, False, False],
        "seen": [True, False, True, True, True, True],
        "added": [True, True, True, False, False, False],
        "given": [True, False, True, False, False, False],
    }
    loss = marks(model, encoder, asked)["right"].loss
    assert loss.argmin() in (0, 5) and loss[1] > loss[5], "what ends an answer has no part in it"
    text = problems("text_sums", encoder, 2, seed=0)
    assert text[0].picture is None and text[0].written == 0
    assert set(Exam(make_base(), encoder, {"text_sums": text}).take(_own(make_base()))) == {
        "text_sums"
    }


def _own(model: Any) -> dict[str, torch.Tensor]:
    from sight import in_scope

    return {name: weight.detach().clone() for name, weight in in_scope(model).items()}


def test_the_comparison_at_a_tiny_size(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row wanted exists; a stopped run goes on; another family's results are refused."""
    import compare
    from reproduction import results

    everything = list(compare.wanted(14))
    assert len({(each.group, each.name) for each in everything}) == len(everything)
    assert (everything[0].group, everything[0].name) == ("models", "mllm")
    few = (
        ("models", ("base", compare.SHOWN)),
        ("task arithmetic", ("1",)),
        ("threshold", ("0.4", "0")),
        ("threshold auto", ("auto",)),
        ("base + dM cut to rank", ("4",)),
    )
    command = ["compare.py", "--family", str(grown), "--out", str(tmp_path), "--problems", "6"]
    monkeypatch.setattr(sys, "argv", command)
    for rows in (few[:2], few):
        monkeypatch.setattr(compare, "WANTED", rows)
        compare.main()
    found = results.read(tmp_path / "results.json")
    assert found.names("threshold") == ["0.4", "0"] and found.seeds == [0]
    assert len(found.entry("models", "mllm")["tasks"]) == 6
    assert set(found.entry("models", compare.SHOWN)["tasks"]) == {"text_sums"}
    norms = {n: found.entry("task arithmetic", n)["norm"][0] for n in ("1",)}
    assert norms["1"] == pytest.approx(1, rel=1e-3)
    assert len(found.data["facts"][0]["weights"]) == found.data["weights"] == 14
    assert found.data["anatomy"]["all"]["matrices"] == 14
    assert 0 < found.data["storage"]["error_expert"]["median"] < 0.5
    tables = (tmp_path / "results.md").read_text(encoding="utf-8")
    rows = tables.split("## Models")[1].splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == 1 + len(found.data["candidates"])
    assert "| matrices | 14 | 28 |" in tables and "| q_proj |" in tables
    monkeypatch.setattr(sys, "argv", [*command[:-1], "5"])
    with pytest.raises(ValueError, match="another run"):
        compare.main()
