"""Evaluations of a tokenizer whose every number can be worked out by hand, and of a real one."""

import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.eval import (
    BlockMean,
    ImageMean,
    Item,
    Measurement,
    Quality,
    Row,
    Share,
    Spent,
    cost_table,
    evaluate,
    format_table,
    length_settings,
    mse,
    psnr_dataset,
    psnr_per_clip,
    psnr_per_frame,
    quality_table,
    satisfaction_of_fixed,
    satisfaction_of_search,
    share_settings,
    ssim_gaussian,
    ssim_uniform,
    threshold_settings,
    to_json,
    write_json,
)
from elastictok.inference import MSE, Binary, Block, FixedLength, Full, Tokenizer
from elastictok.models import presets
from elastictok.quantizers import FSQ


def square(grey):
    """The squared error of a black pixel that should be grey, in [-1, 1]."""
    return (grey / 127.5) ** 2


def error(grey, length):
    """MSE of a flat frame of which so many patches of 9 are right, and the rest black."""
    return square(grey) * (9 - length) / 9


def tokenizer(codec):
    return Tokenizer(codec, FixedLength(length=9))


def test_fixed_lengths_by_hand(grey, flat):
    # Two blocks: frames 0 and 1 alike, then one frame, whose repetition is not counted.
    clip = Item("clip", flat(120, 120, 60), fps=8)
    found = evaluate(tokenizer(grey), [clip], settings=length_settings([3, 9]), name="test")
    three, nine = found.rows
    (measured,) = three.measurements
    assert measured.spent is not None
    assert measured.spent.lengths == (3, 3)
    assert measured.spent.tokens_per_block == 9
    assert (measured.frames, measured.height, measured.width) == (3, 12, 12)
    np.testing.assert_allclose(measured.quality.mse, [error(120, 3), error(120, 3), error(60, 3)])
    np.testing.assert_allclose(measured.block_mse, [error(120, 3), error(60, 3)])
    assert measured.mse == pytest.approx((2 * error(120, 3) + error(60, 3)) / 3)
    # 6 tokens of 8 bits; a length of 2..9 takes 3 bits.
    assert measured.bits == 6 * 8 + 2 * 3
    assert measured.bits_per_pixel == pytest.approx(54 / (3 * 144))
    assert measured.bpp16 == pytest.approx(16 * 48 / (3 * 144))
    assert measured.spent.encoder_evaluations == measured.spent.decoder_evaluations == 2
    assert nine.mse == 0
    assert nine.psnr_dataset == nine.psnr_per_frame == nine.psnr_per_clip == math.inf
    assert nine.measurements[0].quality.ssim_gaussian == pytest.approx((1, 1, 1))
    assert three.encoder_evaluations == three.decoder_evaluations == 1
    assert three.tokens == 3
    assert three.share_of_tokens == pytest.approx(1 / 3)
    assert three.threshold is None
    assert three.blocks_met is None
    assert not three.searched
    assert found.fingerprint == grey.fingerprint


def test_rows_sum_up_as_they_say(grey, flat):
    clips = [flat(120, 100, 60), flat(30), flat(200, 90)]
    items = [Item(str(n), clip) for n, clip in enumerate(clips)]
    (row,) = evaluate(tokenizer(grey), items, settings=length_settings([5])).rows
    outputs = [
        tokenizer(grey).decode(Tokenizer(grey, FixedLength(length=5)).encode(clip))
        for clip in clips
    ]
    pairs = list(zip(clips, outputs, strict=True))
    per_frame = np.concatenate([psnr_per_frame(a, b) for a, b in pairs])
    assert row.psnr_per_frame == pytest.approx(per_frame.mean())
    assert row.psnr_per_clip == pytest.approx(np.mean([psnr_per_clip(a, b) for a, b in pairs]))
    assert row.psnr_dataset == pytest.approx(psnr_dataset(pairs))
    assert (
        len({round(p, 3) for p in (row.psnr_per_frame, row.psnr_per_clip, row.psnr_dataset)}) == 3
    )
    weights = [len(clip) for clip in clips]
    assert row.mse == pytest.approx(np.average([mse(a, b) for a, b in pairs], weights=weights))
    for name, metric in (("ssim_gaussian", ssim_gaussian), ("ssim_uniform", ssim_uniform)):
        expected = np.average([metric(a, b) for a, b in pairs], weights=weights)
        assert getattr(row, name) == pytest.approx(expected)
    # 2 + 1 + 1 blocks of 5 tokens, 6 frames.
    assert row.bits_per_pixel == pytest.approx((4 * (5 * 8 + 3)) / (6 * 144))
    assert row.bpp16 == pytest.approx(16 * 4 * 5 * 8 / (6 * 144))
    assert row.usage is not None
    codes = [120] * 5 + [60] * 5 + [30] * 5 + [200] * 5
    assert row.usage.tokens == len(codes)
    assert row.usage.streams[0].used == 4
    assert row.usage.streams[0].perplexity == pytest.approx(4)


def test_searched_lengths_by_hand(grey, flat):
    # With threshold t a flat frame of grey g needs the first length at which error(g, l) <= t.
    threshold = 0.1
    greys = (120, 60, 20)
    need = [next(n for n in range(2, 10) if error(g, n) <= threshold) for g in greys]
    assert need == [8, 5, 2]
    items = [Item(str(g), flat(g)) for g in greys]
    found = evaluate(tokenizer(grey), items, settings=threshold_settings([MSE(threshold)]))
    (row,) = found.rows
    assert row.name == "MSE ≤ 0.1"
    assert row.lengths == tuple(need)
    assert row.tokens == pytest.approx(np.mean(need))
    assert row.searched
    assert (row.loss, row.threshold) == ("MSE", threshold)
    assert row.blocks_met == row.items_met == 1
    # Bisection of 2..9 looks at 9, 5, then two or three others.
    assert row.encoder_evaluations == row.decoder_evaluations == pytest.approx(4)
    assert row.tokens_quantile(0) == 2
    assert row.tokens_quantile(0.5) == 5
    assert row.tokens_quantile(1) == 8
    full = threshold_settings([MSE(threshold)], search=Full)
    (exhaustive,) = evaluate(tokenizer(grey), items, settings=full).rows
    assert exhaustive.name == "MSE ≤ 0.1, Full"
    assert exhaustive.lengths == row.lengths
    assert exhaustive.encoder_evaluations == 8


def test_what_misses_the_threshold_is_said(grey, flat):
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None] * 20, (12, 12, 3))
    items = [Item("ramp", np.concatenate([np.stack([ramp, ramp]), flat(0)])), Item("flat", flat(9))]
    found = evaluate(tokenizer(grey), items, settings=threshold_settings([MSE(1e-4)]))
    (row,) = found.rows
    assert [m.spent.met for m in row.measurements if m.spent] == [(False, True), (True,)]
    assert row.lengths[0] == 9
    assert row.blocks_met == pytest.approx(2 / 3)
    assert row.items_met == pytest.approx(1 / 2)


def test_curves_of_satisfaction_by_hand(grey, flat):
    greys = (120, 60, 20)
    items = [Item(str(g), flat(g)) for g in greys]
    settings = (*length_settings([8, 2, 5]), *threshold_settings([MSE(0.1)]))
    found = evaluate(tokenizer(grey), items, settings=settings)
    fixed = satisfaction_of_fixed(found.fixed, 0.1)
    assert fixed.tokens == (2, 5, 8)
    assert fixed.share == pytest.approx((1 / 3, 2 / 3, 1))
    searched = satisfaction_of_search(found.searched[0])
    # At most 2 tokens: 2, 2, 2. At most 5: 5, 5, 2. At most 8: 8, 5, 2.
    assert searched.tokens == pytest.approx((2, 4, 5))
    assert searched.share == pytest.approx((1 / 3, 2 / 3, 1))
    with pytest.raises(ValueError, match="fixed lengths"):
        satisfaction_of_search(found.fixed[0])


@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
)
def test_satisfaction_of_search_is_that_of_a_loop(blocks):
    spent = Spent(
        lengths=tuple(length for length, _ in blocks),
        tokens_per_block=9,
        frames_per_block=1,
        bits_per_token=8.0,
        losses=(0.0,) * len(blocks),
        met=tuple(met for _, met in blocks),
        measured=(True,) * len(blocks),
        encoder_evaluations=1,
        decoder_evaluations=1,
        encode_seconds=0.0,
        decode_seconds=0.0,
    )
    quality = Quality((0.0,) * len(blocks), None, None)
    measured = Measurement("x", len(blocks), 4, 4, None, quality, spent)
    curve = satisfaction_of_search(Row("x", True, "MSE", 0.1, (measured,), None))
    points = []
    for limit in sorted({length for length, _ in blocks}):
        cost = [min(length, limit) for length, _ in blocks]
        satisfied = [met and length <= limit for length, met in blocks]
        points.append((sum(cost) / len(blocks), sum(satisfied) / len(blocks)))
    np.testing.assert_allclose(list(zip(curve.tokens, curve.share, strict=True)), points)


def test_baselines_see_what_the_tokenizer_sees(grey):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (2, 24, 36, 3), dtype=np.uint8)
    found = evaluate(
        tokenizer(grey),
        [Item("large", large)],
        settings=length_settings([9]),
        baselines=(ImageMean(), BlockMean(4)),
        keep=1,
    )
    assert [row.rival for row in found.rows] == [False, True, True]
    assert [row.name for row in found.baselines] == ["image mean", "4x4 block mean"]
    truth = tokenizer(grey).fit(large)
    assert truth.shape == (2, 12, 18, 3)
    row = found.row("4x4 block mean")
    assert row.mse == pytest.approx(mse(truth, BlockMean(4)(truth)))
    # 3 x 5 blocks in each of 2 frames.
    assert row.bits_per_pixel == pytest.approx(2 * 15 * 24 / (2 * 12 * 18))
    assert row.tokens is row.usage is row.encode_seconds is row.bpp16 is None
    (sample,) = found.samples
    np.testing.assert_array_equal(sample.truth, truth)
    assert [each.row for each in sample.reconstructions] == [row.name for row in found.rows]
    assert sample.reconstructions[0].tokens is not None
    np.testing.assert_array_equal(sample.reconstructions[2].frames, BlockMean(4)(truth))
    with pytest.raises(KeyError, match="no row 'x'; there are"):
        found.row("x")


def test_latents_have_no_bits(unquantised, flat):
    found = evaluate(tokenizer(unquantised), [Item("a", flat(3))], settings=length_settings([4]))
    (row,) = found.rows
    assert row.bits_per_pixel is row.bpp16 is row.usage is None
    assert row.tokens == 4
    summary = json.loads(to_json([found]))["evaluations"][0]["rows"][0]["summary"]
    assert summary["bits_per_pixel"] is None


def test_only_so_many_samples_are_kept_and_progress_is_told(grey, flat):
    items = [Item(str(n), flat(n)) for n in range(4)]
    steps = []
    found = evaluate(
        tokenizer(grey),
        items,
        settings=length_settings([2, 3]),
        baselines=(ImageMean(),),
        keep=2,
        progress=lambda: steps.append(1),
    )
    assert [sample.item for sample in found.samples] == ["0", "1"]
    assert len(steps) == 4 * 3


def test_compilation_is_done_before_and_once_for_each_size(grey, flat):
    wide = np.zeros((5, 12, 16, 3), np.uint8)
    items = [Item("a", flat(1)), Item("b", flat(2)), Item("c", wide), Item("d", flat(3))]
    evaluate(tokenizer(grey), items, settings=length_settings([7]))
    # Probes of 7 tokens, and a warm-up of the fewest for each of two sizes: of one block for the
    # pictures, and of three, which is all that the window holds, for the clip.
    assert grey.encoded.count(2) == 1 + 3
    assert grey.encoded.count(7) == 1 + 1 + 3 + 1


def test_shares_mean_the_same_at_any_size():
    assert [list(Share(s).search(Block(2, 9))) for s in (0.01, 0.5, 1)] == [[(2,)], [(4,)], [(9,)]]
    assert list(Share(1 / 4).search(Block(4, 64))) == [(16,)]
    names = [setting.name for setting in share_settings()]
    assert names == [
        "1/8 of the tokens",
        "1/4 of the tokens",
        "1/2 of the tokens",
        "3/4 of the tokens",
        "all tokens",
    ]
    assert not any(setting.searched for setting in share_settings())
    for wrong in (0, 1.1, -1, math.nan):
        with pytest.raises(ValueError, match="more than 0, at most 1"):
            Share(wrong)


def test_nothing_to_evaluate_and_equal_names_are_refused(grey, flat):
    with pytest.raises(ValueError, match="at least one picture or clip"):
        evaluate(tokenizer(grey), [], settings=length_settings([2]))
    with pytest.raises(ValueError, match="same name"):
        evaluate(tokenizer(grey), [Item("a", flat(1))], settings=length_settings([2, 2]))


def test_json_is_strict_and_complete(grey, flat, tmp_path):
    items = [Item("a", flat(120)), Item("b", flat(60, 60, 10))]
    settings = (*length_settings([4, 9]), *threshold_settings([MSE(0.1)]))
    found = evaluate(tokenizer(grey), items, settings=settings, baselines=(ImageMean(),), keep=2)
    path = write_json([found, found], tmp_path / "new" / "evaluation.json")
    assert [p.name for p in path.parent.iterdir()] == ["evaluation.json"]

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    facts = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert facts["format"] == "elastictok-evaluation"
    assert facts["version"] == 1
    facts, again = facts["evaluations"]
    assert facts == again
    assert facts["fingerprint"] == grey.fingerprint
    assert [row["name"] for row in facts["rows"]] == [row.name for row in found.rows]
    for row, summed in zip(found.rows, facts["rows"], strict=True):
        assert summed["summary"]["mse"] == pytest.approx(row.mse)
        assert [m["item"] for m in summed["measurements"]] == ["a", "b"]
        assert summed["measurements"][1]["quality"]["mse"] == pytest.approx(
            row.measurements[1].quality.mse
        )
    exact = facts["rows"][1]["summary"]
    assert (exact["mse"], exact["psnr_dataset"]) == (0, None)
    assert facts["rows"][0]["measurements"][0]["spent"]["lengths"] == [4]
    assert facts["rows"][3]["measurements"][0]["spent"] is None


def test_small_frames_have_no_ssim(grey):
    grey_small = Tokenizer(grey, FixedLength(length=1), native=True)
    picture = np.full((1, 8, 8, 3), 50, np.uint8)
    (row,) = evaluate(grey_small, [Item("a", picture)], settings=length_settings([2])).rows
    assert row.ssim_gaussian is None
    assert row.ssim_uniform is not None


def test_tables_say_what_was_found(grey, flat):
    items = [Item("a", flat(120)), Item("b", flat(60))]
    settings = (*length_settings([3]), *threshold_settings([MSE(0.1)]))
    found = evaluate(
        tokenizer(grey), items, settings=settings, baselines=(ImageMean(),), name="Pictures"
    )
    table = quality_table(found)
    assert table.title == "Pictures: 2 items, 12x12"
    cells = {row.cells[0]: dict(zip(table.columns, row.cells, strict=True)) for row in table.rows}
    fixed = cells["3 tokens"]
    assert fixed["tokens"] == "3.0"
    assert fixed["bpp"] == f"{(3 * 8 + 3) / 144:.4f}"
    assert fixed["MSE"] == f"{(error(120, 3) + error(60, 3)) / 2:.4f}"
    assert fixed["met"] == "-"
    assert cells["MSE ≤ 0.1"]["met"] == "100 %"
    assert cells["MSE ≤ 0.1"]["tokens"] == "6.5"
    assert cells["image mean"]["MSE"] == "0.0000"
    assert [row.rival for row in table.rows] == [False, False, True]
    costs = cost_table(found)
    assert "code book of 256" in costs.title
    row = dict(zip(costs.columns, costs.rows[1].cells, strict=True))
    assert (row["least"], row["median"], row["most"]) == ("5", "6", "8")
    assert row["codes"] == "2"
    text = format_table(table)
    lines = text.splitlines()
    rule = lines[2]
    assert set(rule) == {"-"}
    assert lines[0] == table.title
    names = [line if line == rule else line.split("  ")[0] for line in lines[2:7]]
    assert names == [rule, "3 tokens", "MSE ≤ 0.1", rule, "image mean"]
    # Columns are right-aligned under their names.
    assert lines[1].index("bpp") + 3 == lines[3].index(fixed["bpp"]) + len(fixed["bpp"])


def test_a_random_model_end_to_end():
    model = presets.demo(key=jax.random.key(0), quantizer=FSQ((4, 4, 4)))
    rng = np.random.default_rng(0)
    items = [
        Item("picture", rng.integers(0, 256, (1, 20, 16, 3), dtype=np.uint8)),
        Item("clip", rng.integers(0, 256, (5, 16, 20, 4), dtype=np.uint8), fps=4, cuts=(2,)),
    ]
    tok = Tokenizer(model, Binary(MSE(0.5)), native=True)
    found = evaluate(
        tok,
        items,
        settings=(*share_settings([0.5, 1]), *threshold_settings([MSE(1e-6), MSE(4.0)])),
        baselines=(ImageMean(),),
        keep=2,
    )
    half, everything, never, always, _ = found.rows
    # 16x20 pixels are padded to 16x24: 2 x 3 patches of 8x8.
    # Half of them is below the fewest that the model allows.
    assert half.lengths == (4,) * 4
    assert everything.lengths == (6,) * 4
    assert never.lengths == everything.lengths
    assert (never.blocks_met, always.blocks_met) == (0, 1)
    assert always.lengths == (4,) * 4
    clip = found.samples[1]
    assert clip.cuts == (2,)
    for row, each in zip(found.rows, clip.reconstructions, strict=True):
        measured = row.measurements[1]
        assert each.frames.shape == clip.truth.shape == (5, 16, 20, 3)
        assert measured.mse == pytest.approx(mse(clip.truth, each.frames))
        if each.tokens is None or measured.spent is None:
            continue
        # The criterion's own losses are the MSE of the same blocks.
        assert measured.block_mse == pytest.approx(measured.spent.losses)
        np.testing.assert_array_equal(tok.decode(each.tokens), each.frames)
        assert measured.bits == each.tokens.bits
    # Three blocks of 6 tokens of 64 codes; a length of 4..6 takes 2 bits.
    assert everything.measurements[1].bits == pytest.approx(3 * (6 * math.log2(64) + 2))
    assert json.loads(to_json([found]))["evaluations"][0]["rows"]
