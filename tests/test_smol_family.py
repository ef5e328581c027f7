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

FAMILY = Path(__file__).parents[1] / "bench" / "family"
CHARACTERS = "0123456789+=/: \nabcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The scripts import each other as modules beside them."""
    added = [str(FAMILY / "smol"), str(FAMILY)]
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
    from anatomy import anatomy, projected, truncated

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
    torch.testing.assert_close(truncated(second, 1), 8 * torch.outer(other[:, 0], leaning).float())
    inside = projected(second, first, 1)
    torch.testing.assert_close(inside, 4 * torch.outer(other[:, 0], right[:, 0]).float())


def test_the_whole_way_at_a_tiny_size(encoder: Any, tmp_path: Path, capsys: Any) -> None:
    import compare
    from grow import grow_expert, grow_mllm, save
    from tuning import Stage

    base = make_base()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(base.config, name, 0)
    base.generation_config = GenerationConfig()
    save(base, tmp_path / "base", make_tokenizer())
    stage = Stage(2, 3e-3, 6, warmup=1, log_every=1)
    grow_expert(tmp_path, 0, stage, resume=False)
    grow_mllm(tmp_path, 0, stage, sight=(2, 2), resume=False)

    family = compare.Family(tmp_path, {"read": 4, "text_sums": 4, "picture_sums": 4})
    titles = compare.rows_to_measure(family)
    assert len(titles) == 4 + len(compare.MERGES) + 4 + 2 + 2
    whole = family.merged("task_arithmetic", {"scale": 1.0})
    naive = {n: family.weights["mllm"][n] + family.task_vector("expert", n) for n in whole}
    for name in whole:
        assert (whole[name] - naive[name]).norm() < 2**-8 * naive[name].norm(), "bf16's rounding"
    rows = {
        title: {"scores": titles[title]()}
        for title in ("expert", "mllm", "IP-Merging, threshold 0")
    }
    assert set(rows["expert"]["scores"]) == {"text_sums"}
    assert len(rows["mllm"]["scores"]) == 5
    assert compare.table(rows).count("\n") == 5
    matrices = compare.anatomies(family)
    summary = compare.summarise(matrices)
    assert summary["all"]["matrices"] == 14 and summary["q_proj"]["matrices"] == 2
    states = {role: tmp_path / f"{role}.state" for role in ("mllm", "expert")}
    stored = compare.storage(family, states)
    assert 0 < stored["error_expert"]["median"] < 0.5
