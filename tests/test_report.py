"""The report of a made-up workdir: well-formed, complete, safe, and never stopped by a gap."""

import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dlc_jax import report
from dlc_jax.errors import UserError
from dlc_jax.report.chart import bars, chart, log_ticks, thinned, ticks
from dlc_jax.report.curves import read_metrics
from dlc_jax.report.page import LIMIT

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest and collects what a test asks for."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.rows, self.headings, self.sections = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if self.open and self.open[-1] == "h3":
            self.headings.append(data)
        if self.open and self.open[-1] == "h2":
            self.sections.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def _picture(path, size=(40, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


RESULTS = {
    "judge/shape": 0.9996,
    "judge/seen_size": 0.5,
    "judge/seen_count": 77,
    "judge/seen_distance": 0.08,
    "judge/count": 1000,
    "probe/shape": 0.931,
    "probe/count": 2000,
    "reconstruction/shape": 0.883,
    "reconstruction/color": 1.0,
    "reconstruction/valid": 0.5,
    "reconstruction/count": 256,
    "reconstruction_held_out/shape": 0.42,
    "reconstruction_held_out/count": 128,
    "unconditional/valid": 0.617,
    "unconditional/entropy_shape": 0.99,
    "unconditional/values_shape": 6,
    "unconditional/count": 512,
    "composition/shape_from_parents": 0.61,
    "composition/chance_shape_from_parents": 1 / 3,
    "composition/success": 0.5,
    "composition/chance_success": 0.042,
    "composition/both_parents": 0.72,
    "composition/count": 200,
    "without_codes/valid": 0.25,
    "seconds/encoder": 58.25,
    "seconds/total": 3725.0,
    "peak_memory_gb": 1.234,
    "odd/<i>": "a & b",
}


@pytest.fixture
def workdir(tmp_path):
    work = tmp_path / "run <one>"
    work.mkdir()
    (work / "config.json").write_text(
        json.dumps({"name": "quick & small", "data": {"path": "</pre><script>alert('x')</script>"}})
    )
    (work / "results.json").write_text(json.dumps(RESULTS))
    for step in ("prior", "encoder"):
        (work / step).mkdir()
        lines = [
            {
                "step": i,
                "loss": 4 / i,
                "learning_rate": 1e-3,
                "images_per_second": 900 + i,
                "code_entropy": 2.0,
            }
            for i in range(1, 30)
        ]
        lines.append({"step": 20, "validation/loss": 0.5})
        text = "\n".join(map(json.dumps, lines))
        (work / step / "metrics.jsonl").write_text(
            text + '\n{"step": 30, "loss": NaN}\n[1]\n{"step": 31, "lo'
        )
    _picture(work / "prior" / "pictures" / "un<conditional>.png")
    _picture(work / "prior" / "pictures" / "composition_two.png")
    (work / "prior" / "pictures" / "captions.json").write_text(
        json.dumps({"un<conditional>.png": 'Samples <b>"drawn"</b> & shown.'})
    )
    return work


def _page(work):
    text = report.write(work).read_text()
    return Page(text), text


def test_it_is_one_file_without_scripts_or_outside_resources(workdir):
    page, text = _page(workdir)
    assert text.startswith("<!DOCTYPE html>") and len(text) < LIMIT
    assert (
        not page.of("script") and not page.of("link") and not page.of("iframe") and not page.of("b")
    )
    assert (
        "url(" not in text
        and "@import" not in text
        and "http:" not in text
        and "https:" not in text
    )
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert re.match(
            r"data:image/(png|jpeg);base64,", attributes.get("src", "data:image/png;base64,")
        )
        assert "href" not in attributes
    assert any(
        meta.get("name") == "viewport" and "width=device-width" in meta["content"]
        for meta in page.of("meta")
    )
    assert "prefers-color-scheme: dark" in text and "max-width: 100%" in text


def test_names_and_captions_are_escaped(workdir):
    page, _ = _page(workdir)
    assert "</pre><script>alert('x')</script>" in page.words
    assert 'Samples <b>"drawn"</b> & shown.' in page.words
    assert "dlc_jax: run <one>" in page.words
    assert ["<i>", "a & b"] in page.rows


def test_results_are_percentages_with_chance_and_counts(workdir):
    page, _ = _page(workdir)
    for row in (
        ["shape", "> 99.9 %", "1\u202f000"],
        ["seen size", "50 %", "77"],
        ["seen distance", "0.08"],
        ["shape", "93.1 %", "2\u202f000"],
        ["color", "100 %", "256"],
        ["entropy shape", "99 %", "512"],
        ["values shape", "6"],
        ["shape from parents", "61 %", "33.3 %", "200"],
        ["both parents", "72 %", "200"],
        ["valid", "25 %"],
        ["encoder", "58.2 s", "1.6 %"],
        ["total", "1 h 02 min"],
        ["peak memory gb", "1.23 GB"],
    ):
        assert row in page.rows
    assert ["measure", "value", "by chance", "images"] in page.rows
    tables = [
        "Reconstruction",
        "Reconstruction held out",
        "Unconditional",
        "Composition",
        "Without codes",
        "Probe",
        "Odd",
        "Judge",
    ]
    assert page.headings[-9:] == [*tables, "Other"]
    assert page.sections[-5:] == ["Curves: prior", "Results", "Time", "Versions", "Config"]


def test_the_summary_says_the_headline_numbers(workdir):
    page, _ = _page(workdir)
    assert (
        "turned into a code and back into an image, kept: shape 88.3 %, color 100 %." in page.words
    )
    assert "combinations of factors that training never saw: shape 42 %." in page.words
    assert "Of 512 samples drawn without any condition, 61.7 % are valid." in page.words
    assert (
        "have from one of them: shape 61 %. 50 % of the compositions succeed, where chance gives "
        "4.2 %. In 72 % of the compositions both parents show." in page.words
    )
    assert "The whole run took 1 h 02 min." in page.words


def test_pictures_are_there_pixel_for_pixel_with_a_sentence(workdir):
    page, _ = _page(workdir)
    images = page.of("img")
    assert len(images) == 2 and all(image["alt"] in page.words for image in images)
    for image in images:
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))
        assert shown.shape == (40, 60, 3) and shown.std() > 10
        assert (image["width"], image["height"]) == ("60", "40") and image["alt"]
    assert {image["alt"] for image in images} == {
        "Composition two.",
        'Samples <b>"drawn"</b> & shown.',
    }


def test_damaged_pictures_and_captions_are_left_out(workdir):
    pictures = workdir / "prior" / "pictures"
    whole = (pictures / "composition_two.png").read_bytes()
    (pictures / "composition_two.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "text.png").write_text("no picture")
    (pictures / "captions.json").write_text("{")
    page, _ = _page(workdir)
    assert [image["alt"] for image in page.of("img")] == ["Un<conditional>."]


def test_a_long_series_is_thinned_to_both_ends_and_some_between(workdir):
    for step in range(0, 2000, 100):
        _picture(workdir / "encoder" / "pictures" / f"samples_{step}.png")
    page, _ = _page(workdir)
    shown = [
        int(image["alt"].split()[1][:-1])
        for image in page.of("img")
        if image["alt"].startswith("Samples ") and "<" not in image["alt"]
    ]
    assert shown == [0, 400, 800, 1100, 1500, 1900]


def test_the_file_stays_below_its_limit(workdir):
    # What a long run leaves: noise is the worst that a picture can be, and every step has many
    # curves with many points.
    for name in [f"wide_{chr(97 + i)}" for i in range(20)]:
        _picture(workdir / "encoder" / "pictures" / f"{name}.png", size=(900, 900))
    for step in range(10):
        (workdir / f"stage{step}").mkdir()
        rows = [
            {"step": i, "loss": 1 / (i + 1), **{f"metric_{k}": (i * k) % 7 for k in range(30)}}
            for i in range(3000)
        ]
        (workdir / f"stage{step}" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page, text = _page(workdir)
    assert 6_000_000 < len(text.encode()) < LIMIT
    assert (
        "Too large for this file, see the workdir: wide" in page.words
        and 5 < len(page.of("img")) < 20
    )


def test_large_pictures_are_shown_smaller(workdir):
    _picture(workdir / "prior" / "pictures" / "photos.png", size=(600, 3000))
    page, _ = _page(workdir)
    photos = next(image for image in page.of("img") if image["alt"] == "Photos.")
    assert (photos["width"], photos["height"]) == ("1400", "280") and photos["src"].startswith(
        "data:image/jpeg;"
    )
    shown = Image.open(io.BytesIO(base64.b64decode(photos["src"].partition(",")[2])))
    assert shown.size == (1400, 280) and np.asarray(shown).std() > 5


def test_pictures_come_in_the_order_of_their_captions_and_series_after_what_was_made_at_the_end(
    workdir,
):
    for name in ("step_2", "step_10", "step_1"):
        _picture(workdir / "encoder" / "pictures" / f"{name}.png")
    captions = {"un<conditional>.png": "First.", "composition_two.png": "Second."}
    (workdir / "prior" / "pictures" / "captions.json").write_text(json.dumps(captions))
    page, _ = _page(workdir)
    assert [image["alt"] for image in page.of("img")] == [
        "First.",
        "Second.",
        "Step 1.",
        "Step 2.",
        "Step 10.",
    ]
    assert page.sections[:2] == ["Pictures: prior", "Learning to draw: encoder"]


def test_curves_have_axes_numbers_and_both_losses(workdir):
    page, text = _page(workdir)
    assert page.words.index("Curves: encoder") < page.words.index("Curves: prior")
    labels = [svg["aria-label"] for svg in page.of("svg")]
    assert labels[:4] == [
        "Loss over steps",
        "Learning rate over steps",
        "Images per second over steps",
        "Code entropy over steps",
    ]
    line = [
        tuple(map(float, point.split(","))) for point in page.of("polyline")[0]["points"].split()
    ]
    assert len(line) == 29
    # Steps 1 to 29 over the axis from 76 to 446; loss 4 at the top, 4 / 29 at the bottom.
    assert line[0] == (76.0, 54.0) and line[-1] == (446.0, 236.0)
    middle = 236 - (4 / 15 - 4 / 29) / (4 - 4 / 29) * 182
    assert line[14] == pytest.approx((76 + 14 / 28 * 370, middle), abs=0.06)
    assert len(page.of("circle")) == 2  # one validation loss in each step
    svg = Page(text[text.index("<svg") : text.index("</svg>") + 6]).words
    assert (
        "step" in svg
        and "loss: 0.1379 at the end" in svg
        and "validation loss: 0.5 at the end" in svg
    )
    assert all(number in svg.split() for number in ("1", "2", "3", "4", "10", "20"))


def test_every_chart_of_a_stage_has_a_sentence_and_rates_start_at_zero(workdir):
    rows = [
        {"step": i, "loss": 1.0, "images_per_second": 900 + i, "data_wait": 0.0001}
        for i in range(5)
    ]
    (workdir / "encoder" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.rmtree(workdir / "prior")
    page, text = _page(workdir)
    assert len(page.of("svg")) == len(page.of("figcaption")) == 3
    rate, wait = (
        Page("<svg" + part.partition("</svg>")[0] + "</svg>").words.split()
        for part in text.split("<svg")[2:4]
    )
    assert "0" in rate and "400" in rate
    assert "5" in wait and "%" in wait  # a wait of nothing is not blown up to a mountain


def test_losses_far_apart_are_drawn_logarithmically():
    text = chart("Loss", {"loss": [(0, 100.0), (1, 1.0), (2, 0.01)]})
    assert "Loss (logarithmic)" in text
    (line,) = Page(text).of("polyline")
    heights = [float(point.split(",")[1]) for point in line["points"].split()]
    assert heights == [34.0, 135.0, 236.0]  # equal steps for equal factors
    assert log_ticks(0.01, 100) == [0.01, 0.1, 1, 10, 100] and log_ticks(0.3, 6) == [0.5, 1, 2, 5]
    assert log_ticks(1e-30, 1e30) == [float(f"1e{k}") for k in range(-30, 31, 11)]
    assert "(logarithmic)" not in chart("Loss", {"loss": [(0, 0.0), (1, 100.0)]})


USAGE = {
    "values": 8,
    "count": 1000,
    "perplexity": [8, 4, 1],
    "by_rank": [0.5, 0.25, 0.25, 0, 0, 0, 0, 0],
}


def test_code_usage_has_a_bar_for_each_position_and_value(workdir):
    (workdir / "codes").mkdir()
    (workdir / "codes" / "usage.json").write_text(json.dumps(USAGE))
    page, text = _page(workdir)
    assert "Code usage: codes" in page.sections
    assert (
        "3 positions of a code can take 8 values; over 1 000 images the mean perplexity is 4.333"
        in page.words
    )
    first, second = (path["d"] for path in page.of("path"))
    tops = [float(y) for y in re.findall(r"M[\d.]+,236V([\d.]+)H", first)]
    assert tops == [14.0, 125.0, pytest.approx(236 - 222 / 8, abs=0.06)]  # 8 of 8 is full height
    assert len(re.findall("V", second)) == 2 * 8


@pytest.mark.parametrize(
    "change",
    [{"perplexity": []}, {"by_rank": None}, {"values": "x"}, {"perplexity": [float("nan")]}, []],
)
def test_odd_code_usage_is_left_out(workdir, change):
    (workdir / "codes").mkdir()
    (workdir / "codes" / "usage.json").write_text(json.dumps(USAGE | change if change else change))
    page, _ = _page(workdir)
    assert not any(section.startswith("Code usage") for section in page.sections)


def test_half_a_thousand_positions_are_drawn_too():
    assert len(bars("x", [1.0] * 512, under="position")) < 30_000


def test_of_a_step_written_twice_the_later_line_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 2, "loss": 9}', '{"step": 1, "loss": 3}']
    rows.append('{"step": 2, "loss": 1, "note": "x", "ok": true}')
    path.write_text("\n".join(rows) + "\n")
    assert read_metrics(path) == {"loss": [(1, 3), (2, 1)]}


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.13, 4, 5) == [1, 2, 3, 4]
    assert ticks(1e-4, 3.1e-4, 5) == [1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4]
    assert ticks(-3, 12, 5) == [0, 5, 10]


def test_long_curves_are_thinned_without_losing_a_spike():
    line = [(i, 0.0) for i in range(100_000)]
    line[54_321] = (54_321, 7.0)
    thin = thinned(line)
    assert (
        len(thin) <= 402 and (54_321, 7.0) in thin and thin[0] == line[0] and thin[-1] == line[-1]
    )
    assert thin == sorted(thin)


def test_constant_and_single_values_have_a_curve():
    for line in (
        [(5, 0.0)],
        [(1, 2.0), (2, 2.0)],
        [(1, -3.0), (1, -3.0)],
        [(1, 0.0), (2, 5e-324)],
        [(1, 1.0), (2, 1.0 + 3e-16)],
    ):
        Page(chart("x", {"x": line}))


def test_versions_and_commit(workdir):
    page, _ = _page(workdir)
    names = [row[0] for row in page.rows if row]
    assert {"python", "jax", "flax", "dlc_jax"} <= set(names)
    (workdir / "results.json").write_text(
        '{"commit": "abc123", "device": "8 x Abacus", "seconds/prior": 60, "seconds/total": 240}'
    )
    page, _ = _page(workdir)
    assert ["commit", "abc123"] in page.rows and "On 8 x Abacus." in page.words
    assert ["prior", "1 min 00 s", "25 %"] in page.rows and ["total", "4 min 00 s"] in page.rows


def test_config_is_folded_away(workdir):
    page, text = _page(workdir)
    assert page.of("details") and '"name": "quick & small"' in page.words


@pytest.mark.parametrize("missing", ["config.json", "results.json", "prior", "encoder", None])
def test_what_is_missing_is_left_out(workdir, missing):
    for path in list(workdir.iterdir()) if missing is None else [workdir / missing]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, _ = _page(workdir)
    assert page.of("h1")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"config": {"a": [1]}, "b": null, "judge/x": NaN}', '{"judge/count": 3}'],
)
def test_odd_files_make_a_report_too(workdir, content):
    for name in ("config.json", "results.json"):
        (workdir / name).write_text(content)
    _page(workdir)


def test_a_missing_workdir_and_an_unwritable_path_are_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match="no workdir"):
        report.write(tmp_path / "none")
    with pytest.raises(UserError, match="cannot write the report"):
        report.write(workdir, tmp_path / "no" / "such" / "report.html")
    with pytest.raises(UserError, match="cannot write the report"):
        report.write(workdir, workdir / "prior")  # a directory: found out when all is written
    assert report.write(workdir, tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert not list(tmp_path.rglob("*.partial"))


def test_steps_come_in_the_order_of_the_config(workdir):
    (workdir / "config.json").write_text(json.dumps({"steps": ["prior", "encoder"]}))
    page, _ = _page(workdir)
    assert page.words.index("Curves: prior") < page.words.index("Curves: encoder")
    shutil.copytree(workdir / "prior", workdir / "ablation")
    # as the recipe ran last: its steps joined the others
    (workdir / "config.json").write_text(json.dumps({"steps": ["ablation"]}))
    page, _ = _page(workdir)
    assert page.sections[2:5] == ["Curves: encoder", "Curves: prior", "Curves: ablation"]
