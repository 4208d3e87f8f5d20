"""The report as a browser takes it: parsed, and looked through for anything from outside."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from elastictok.eval import (
    Chart,
    ClipSection,
    ImageMean,
    Item,
    Level,
    Line,
    PictureSection,
    Report,
    Shot,
    Table,
    TableRow,
    Video,
    build_report,
    evaluate,
    length_settings,
    render_chart,
    render_report,
    side_by_side,
    threshold_settings,
    write_report,
)
from elastictok.eval._charts import _spread
from elastictok.inference import MSE, FixedLength, Tokenizer

NASTY = (
    """"><script>alert(1)</script>&<img src=http://evil.example/x.png> 'q' $x^2$ {{ 7*7 }}.png"""
)
VOID = {"meta", "img", "br", "link", "input", "hr", "source", "use", "path"}


class Page(HTMLParser):
    """Elements with their attributes and text; complains of tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"repeated attribute in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, of_class=None):
        return [
            attrs
            for name, attrs in self.elements
            if name == tag and (of_class is None or of_class in (attrs.get("class") or "").split())
        ]

    def text(self):
        return " ".join(data for tag, data in self.texts if tag != "style")


def picture(height=12, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(frames, height=12, width=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def section(frames=7, **changes):
    """Seven frames in blocks of two, with 4, 3, 2 and 1 of 8 tokens."""
    blocks = -(-frames // 2)
    given = {
        "name": "clip",
        "truth": clip(frames),
        "reconstruction": clip(frames, seed=1),
        "lengths": tuple(range(blocks, 0, -1)),
        "longest": 8,
        "frames_per_block": 2,
    }
    return ClipSection(**{**given, **changes})


def full_report(name="a name"):
    chart = Chart(
        title=name,
        x_label=name,
        y_label="MSE",
        lines=(Line(name, (1, 2, 4), (3.0, 2.0, 1.0)), Line("other", (1, 2), (1.0, 0.5))),
        levels=(Level(name, 1.5), Level("near", 1.51), Level("far", 5)),
        alt=f"{name} falls",
    )
    return Report(
        title=name,
        lead=name,
        tables=(
            Table(name, ("", name), (TableRow((name, "1")), TableRow(("r", "2"), True)), name),
        ),
        charts=(chart, chart),
        pictures=(PictureSection(name, picture(), (Shot(name, picture(seed=1), (name, "x")),)),),
        clips=(
            section(
                name=name,
                caption=name,
                met=(True, True, False, True),
                cuts=(3,),
                video=Video(b"\x00\x01mp4", name),
            ),
        ),
        notes=(name, "another"),
    )


def fetched(page):
    """Everything that a browser would fetch or follow."""
    names = ("src", "href", "srcset", "poster", "data", "action", "xlink:href", "background")
    return [(tag, attrs[name]) for tag, attrs in page.elements for name in names if name in attrs]


@pytest.mark.parametrize("name", ["a name", NASTY])
def test_nothing_is_fetched_or_run(name):
    text = render_report(full_report(name))
    page = Page(text)
    for tag, source in fetched(page):
        inside = source.startswith("#") and tag == "use"
        assert inside or re.match(r"data:(image/png|video/mp4);base64,[\w+/]+=*$", source), tag
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    styles = " ".join([data for tag, data in page.texts if tag == "style"])
    styles += " ".join(attrs.get("style") or "" for _, attrs in page.elements)
    assert "@import" not in styles
    assert not re.search(r"url\((?!#)", styles + " ".join(str(e) for e in page.elements))
    # And no address at all, but in the name.
    assert not re.search(r"https?:", text.replace("http://evil.example", ""))
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy


def test_names_are_escaped_everywhere():
    page = Page(render_report(replace(full_report(NASTY), charts=())))
    clean = Page(render_report(replace(full_report("a name"), charts=())))
    # The same elements, in the same order: the name added none.
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements]
    assert page.text().count(NASTY) == clean.text().count("a name")
    assert clean.text().count("a name") >= 12
    (title,) = [data for tag, data in page.texts if tag == "title"]
    assert title == NASTY
    assert any(attrs["alt"].startswith(NASTY) for attrs in page.all("img"))


def test_names_are_escaped_in_charts():
    page = Page(render_chart(full_report(NASTY).charts[0]))
    assert {tag for tag, _ in page.elements} <= {
        *("svg", "g", "defs", "style", "clippath", "rect", "path", "use", "text", "tspan")
    }
    # In the plot long names are cut.
    assert page.text().count(NASTY[:39] + "…") == 3
    (svg,) = page.all("svg")
    assert svg["aria-label"] == f"{NASTY} falls"


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))


def test_pictures_are_the_pixels_that_were_given():
    truth, other = picture(), picture(seed=1)
    report = Report("t", pictures=(PictureSection("p", truth, (Shot("8 tokens", other),)),))
    page = Page(render_report(report))
    first, second = page.all("img")
    np.testing.assert_array_equal(decoded(first["src"]), truth)
    np.testing.assert_array_equal(decoded(second["src"]), other)
    assert (first["alt"], second["alt"]) == ("p: truth", "p: 8 tokens")
    assert first["class"] == "small"
    large = Report("t", pictures=(PictureSection("p", picture(200, 8), ()),))
    assert "class" not in Page(render_report(large)).all("img")[0]


def percent(style, name):
    return float(re.search(rf"(?:^|; ?){name}: ([\d.]+)%", style)[1])


def test_bars_stand_under_their_frames():
    page = Page(render_report(Report("t", clips=(section(met=(True, False, True, True)),))))
    bars = page.all("div", "bar")
    # Seven frames: blocks of 2, 2, 2 and 1.
    np.testing.assert_allclose(
        [percent(bar["style"], "left") for bar in bars], np.array([0, 2, 4, 6]) * 100 / 7, atol=1e-3
    )
    np.testing.assert_allclose(
        [percent(bar["style"], "width") for bar in bars],
        np.array([2, 2, 2, 1]) * 100 / 7,
        atol=1e-3,
    )
    heights = [percent(attrs["style"], "height") for attrs in page.all("i")]
    np.testing.assert_allclose(heights, [50, 37.5, 25, 12.5])
    assert ["missed" in bar["class"].split() for bar in bars] == [False, True, False, False]
    assert bars[1]["title"] == "frames 2 to 3: 3 of 8 tokens, misses the threshold"
    assert bars[3]["title"] == "frame 6: 1 of 8 tokens, meets the threshold"
    (group,) = page.all("div", "bars")
    assert group["aria-label"] == "Tokens used by each block, of 8: 4, 3, 2, 1."
    assert "misses the threshold" in page.text()


def test_without_a_threshold_nothing_is_said_to_miss_it():
    page = Page(render_report(Report("t", clips=(section(),))))
    assert "threshold" not in page.text()
    assert page.all("div", "bar")[0]["title"] == "frames 0 to 1: 4 of 8 tokens"
    assert page.all("div", "missed") == []


def test_cuts_are_marked_where_they_are():
    page = Page(render_report(Report("t", clips=(section(cuts=(2, 6)),))))
    left = [percent(cut["style"], "left") for cut in page.all("div", "cut")]
    np.testing.assert_allclose(left, [200 / 7, 600 / 7], atol=1e-3)
    assert "cut, frame 6" in page.text()
    (group,) = page.all("div", "bars")
    assert group["aria-label"].endswith("Cuts before frames 2, 6.")
    assert Page(render_report(Report("t", clips=(section(),)))).all("div", "cut") == []


def test_filmstrips_hold_the_frames():
    given = section()
    strips = [
        decoded(a["src"]) for a in Page(render_report(Report("t", clips=(given,)))).all("img")
    ]
    for strip, frames in zip(strips, (given.truth, given.reconstruction), strict=True):
        assert strip.shape == (12, 7 * 16, 3)
        for index, frame in enumerate(frames):
            np.testing.assert_array_equal(strip[:, 16 * index : 16 * (index + 1)], frame)


def test_long_clips_are_thinned_and_high_ones_made_smaller():
    long = section(frames=98, cuts=(50,))
    page = Page(render_report(Report("t", clips=(long,))))
    strip = decoded(page.all("img")[0]["src"])
    # Every fifth frame: the last of 20 cells stands for two frames that are not there.
    assert strip.shape == (12, 20 * 16, 3)
    np.testing.assert_array_equal(strip[:, 16:32], long.truth[5])
    assert "one frame of every 5 shown" in page.text()
    assert len(page.all("div", "bar")) == 49
    assert percent(page.all("div", "cut")[0]["style"], "left") == pytest.approx(50)
    high = section(truth=clip(7, 192, 100), reconstruction=clip(7, 192, 100))
    page = Page(render_report(Report("t", clips=(high,))))
    assert decoded(page.all("img")[0]["src"]).shape == (96, 7 * 50, 3)


def test_the_video_is_inside():
    page = Page(render_report(Report("t", clips=(section(video=Video(b"film", "both")),))))
    (video,) = page.all("video")
    assert base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,")) == b"film"
    assert {"controls", "loop", "muted"} <= set(video)
    assert "both" in page.text()


def test_clips_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="7 frames are 4 blocks of 2, but there are 3 lengths"):
        section(lengths=(1, 2, 3))
    with pytest.raises(ValueError, match="4 blocks, but 1 values of met"):
        section(met=(True,))
    with pytest.raises(ValueError, match="a cut at frame 7 of a clip of 7"):
        section(cuts=(7,))
    with pytest.raises(ValueError, match=r"has 1 cells, the table 2"):
        Table("t", ("a", "b"), (TableRow(("x",)),))
    with pytest.raises(ValueError, match="give pairs"):
        Line("l", (1.0,), ())


def test_charts_have_their_text_and_colours():
    chart = full_report().charts[0]
    page = Page(render_chart(chart))
    text = page.text()
    for words in ("a name", "other", "near", "far", "MSE"):
        assert words in text
    (svg,) = page.all("svg")
    assert svg["role"] == "img"
    assert svg["aria-label"] == "a name falls"
    assert "width" not in svg
    # Text is the page's colour; nothing else is black, which would vanish on a dark page.
    styles = " ".join(attrs.get("style") or "" for _, attrs in page.elements)
    assert "currentColor" in styles
    assert not re.search(r"#000000|#010203|black", styles)


def test_dollars_are_not_mathematics():
    name = "$x^2$"
    lines = (Line(name, (1, 2), (1, 2)), Line("b", (1,), (1,)))
    chart = Chart("c", name, name, lines, (Level(name, 1),), "alt")
    assert Page(render_chart(chart)).text().count(name) == 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.12))
def test_labels_keep_order_and_distance(heights, gap):
    places = _spread(heights, gap)
    order = np.argsort(heights, kind="stable")
    assert all(b - a >= gap - 1e-9 for a, b in zip(places, places, strict=True) if a != b and b > a)
    ordered = np.array(places)[order]
    assert np.all(np.diff(ordered) >= gap - 1e-9)
    assert min(places) >= -1e-9
    assert max(places) <= 1 + 1e-9
    apart = np.all(np.diff(np.sort(heights)) >= gap)
    if apart:
        np.testing.assert_allclose(places, heights, atol=1e-9)


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = write_report(full_report(), tmp_path / "deep" / "report.html")
    before = path.read_text("utf-8")
    assert before.startswith("<!doctype html>")
    # Who has the old page open can read it to its end.
    with path.open(encoding="utf-8") as reader:
        write_report(Report("new"), path)
        assert reader.read() == before
    before = path.read_text("utf-8")
    # A lone surrogate, as a file name that is not UTF-8 gives, cannot be written.
    with pytest.raises(UnicodeEncodeError):
        write_report(Report("\udc80"), path)
    assert path.read_text("utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_an_empty_report_is_a_page():
    page = Page(render_report(Report("nothing")))
    assert page.all("img") == page.all("table") == page.all("svg") == []


def test_a_report_of_evaluations(grey, flat):
    tokenizer = Tokenizer(grey, FixedLength(length=9))
    settings = (*length_settings([2, 9, 5]), *threshold_settings([MSE(0.1), MSE(0.3)]))
    pictures = evaluate(
        tokenizer,
        [Item(NASTY, flat(120)), Item(NASTY, flat(60))],
        settings=settings,
        baselines=(ImageMean(),),
        name="Pictures",
        keep=1,
    )
    films = evaluate(
        tokenizer,
        [Item("film", flat(120, 120, 20, 20, 20), fps=5, cuts=(2,))],
        settings=settings,
        name="Clips",
        keep=1,
    )
    report = build_report(
        [pictures, films],
        title="Title",
        notes=["honest"],
        videos={"film": Video(b"film", "side by side")},
    )
    assert [table.title.split(":")[0] for table in report.tables] == ["Pictures", "Clips"] * 2
    (shown,) = report.pictures
    assert [shot.caption for shot in shown.shots] == [
        "9 tokens",
        "5 tokens",
        "2 tokens",
        "MSE ≤ 0.1: 8 tokens",
        "MSE ≤ 0.3: 6 tokens",
        "image mean",
    ]
    # Of the item that is shown, not of another one of the same name.
    assert shown.shots[1].details == ("MSE 0.3937", "10.1 dB, 0.3 bpp")
    first, second = report.clips
    assert first.lengths == (8, 2, 2)
    assert first.met == (True, True, True)
    assert first.cuts == (2,)
    assert first.frames_per_block == 2
    assert "MSE ≤ 0.1" in first.caption
    assert "12 tokens in 3 blocks" in first.caption
    assert first.video is not None
    assert second.video is None
    charts = {chart.title: chart for chart in report.charts}
    assert list(charts) == [
        "Pictures: MSE",
        "Pictures: PSNR",
        "Pictures: blocks with MSE ≤ 0.1",
        "Pictures: blocks with MSE ≤ 0.3",
        "Clips: MSE",
        "Clips: PSNR",
        "Clips: blocks with MSE ≤ 0.1",
        "Clips: blocks with MSE ≤ 0.3",
    ]
    curve = charts["Pictures: MSE"].lines[0]
    assert curve.x == (2, 5, 9)
    assert curve.y == tuple(pictures.row(f"{n} tokens").mse for n in (2, 5, 9))
    # All tokens are exact: an infinite PSNR has no place in a chart.
    assert charts["Pictures: PSNR"].lines[0].x == (2, 5)
    (level,) = charts["Pictures: MSE"].levels
    assert level.name == "image mean (0.17 bpp)"
    page = Page(render_report(report))
    assert NASTY in page.text()
    assert "honest" in page.text()
    assert len(page.all("svg")) == 8
    assert len(page.all("video")) == 1


def test_the_readme_runs_as_it_stands(grey, tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[2] / "eval" / "README.md"
    (block,) = re.findall(r"```python\n(.*?)```", readme.read_text("utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"model": grey, "picture": clip(1), "training": [clip(2, seed=n) for n in range(3)]}
    exec(compile(block, str(readme), "exec"), names)
    assert "6-component PCA" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "report.html"}


def test_side_by_side():
    left, right = clip(2), clip(2, seed=1)
    both = side_by_side(left, right)
    np.testing.assert_array_equal(both[:, :, :16], left)
    np.testing.assert_array_equal(both[:, :, 16:], right)
