"""The page in a real headless Chromium: what it asks for, and that everything on it works."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import PHONE, Opened
from page_folders import HOSTILE, RULES, small_sweep

from lark.comparison.summaries import read_summaries
from lark.page.write import NAME, PLOTLY, write_page

pytestmark = pytest.mark.slow

TEXTS = [
    "One.\nTwo.\nThe answer is \\boxed{0}.",
    "Uno \u2603 only here \U0001d400.",
    *HOSTILE,
    "null \x00 half \ud800 pair",
]

OVERLAPPING = """() => {
    const beside = (a, b) => a.bottom < b.top + 2 || a.right < b.left + 2;
    return [...document.querySelectorAll("div.plot")].flatMap((plot) => {
        const labels = [...plot.querySelectorAll(".ytick text, .xtick text")];
        const boxes = labels.map((label) => label.getBoundingClientRect());
        return boxes.filter((a, i) => boxes.slice(i + 1).some((b) => !beside(a, b) && !beside(b, a)));
    }).length;
}"""
"""How many ticks' labels lie on others."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    small_sweep(folder, texts=TEXTS, problems=120)
    return write_page(read_summaries([folder]), folder / NAME)


@contextmanager
def opened(browser, path: Path, stage: str = "listed", **settings) -> Iterator[Opened]:
    """Once the page has come as far as that; afterwards it must have said nothing and asked for its library only."""
    one = Opened(browser, path, **settings)
    later = ("listed", "opened", "drawn")
    waited = later[later.index(stage) :]
    one.page.wait_for_selector(", ".join(f"html[data-page={name}]" for name in waited), state="attached")
    yield one
    assert one.errors == []
    assert set(one.requests) <= {path.as_uri(), (path.parent / PLOTLY).as_uri()}
    one.close()


def cards(page) -> list[str]:
    return page.locator(".card h4 bdi").all_inner_texts()


def test_every_plot_is_drawn_without_a_word_and_nothing_goes_to_a_cloud(browser, path):
    with opened(browser, path, "drawn") as one:
        plots = one.page.locator("div.plot")
        assert plots.count() == 12
        for i in range(plots.count()):
            box = plots.nth(i)
            assert box.locator("svg.main-svg").count() > 0
            assert box.evaluate("box => box.querySelector('svg').clientWidth <= box.clientWidth")
            names = box.locator(".modebar-btn").evaluate_all("found => found.map(one => one.dataset.title)")
            assert names and not any(word in name for name in names for word in ("Share", "cloud", "Edit"))
        assert one.requests == [path.as_uri(), (path.parent / PLOTLY).as_uri()]
        assert one.page.locator(".ytick text").count() > 50
        assert one.page.evaluate(OVERLAPPING) == 0


def test_a_table_is_sorted_by_a_column_with_mouse_and_keyboard(browser, path):
    with opened(browser, path) as one:
        table = one.page.locator("table").first
        button = table.locator("thead button", has_text="eval avg@4")
        number = button.evaluate("button => [...button.closest('tr').cells].indexOf(button.parentElement)")

        def column() -> list[float]:
            cells = table.locator(f"tbody tr > :nth-child({number + 1})").all_inner_texts()
            return [float(cell.strip("%")) for cell in cells]

        before = column()
        button.click()
        assert column() == sorted(before, reverse=True) != sorted(before)
        assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
        button.focus()
        one.page.keyboard.press("Enter")
        assert column() == sorted(before)
        labels = table.locator("thead button").first
        labels.click()
        rows = table.locator("tbody th").all_inner_texts()
        assert rows == sorted(rows) and len(rows) == 4
        assert table.locator("th[aria-sort]").count() == 1
        losses = table.locator("thead button", has_text="trained tokens")
        losses.click()
        assert table.locator("tbody th").all_inner_texts()[-1] == "before training"  # it has none


def test_tables_fit_until_all_columns_are_asked_for(browser, path):
    with opened(browser, path) as one:
        sheets = one.page.locator(".sheet")
        fits = "sheet => sheet.querySelector('table').scrollWidth <= sheet.querySelector('.scroll').clientWidth"
        for number in range(sheets.count()):
            sheet = sheets.nth(number)
            assert sheet.evaluate(fits)
            columns = sheet.locator("th[scope=col]:visible").count()
            sheet.locator(".switch input").check()
            assert sheet.locator("th[scope=col]:visible").count() > columns


def test_trajectories_are_filtered_by_teacher_rule_and_answer(browser, path):
    with opened(browser, path) as one:
        page = one.page
        assert page.locator("#matches").inner_text() == "600 of 600 trajectories match, in 120 of 120 problems."
        assert page.locator("#problems li").count() == 100
        page.locator("#more").click()
        assert page.locator("#problems li").count() == 120
        page.select_option("#teacher", label="phi-4")
        assert page.locator("#matches").inner_text() == "120 of 600 trajectories match, in 120 of 120 problems."
        assert cards(page) == ["phi-4"]
        page.select_option("#rule", label="lark")
        chosen = int(page.locator("#matches").inner_text().split()[0])
        assert 0 < chosen < 120
        assert page.locator(".card.chosen .chips .now").inner_text().startswith("lark × ")
        page.select_option("#correct", "false")
        assert 0 < int(page.locator("#matches").inner_text().split()[0]) < chosen
        assert page.locator(".card .verdict").all_inner_texts() == ["✗ wrong"]
        page.select_option("#correct", "null")
        assert "No trajectory matches" in page.locator("#problem").inner_text()


def test_a_problem_shows_its_candidates_side_by_side(browser, path):
    with opened(browser, path) as one:
        page = one.page
        page.locator("#problems button").nth(3).click()
        assert page.locator("#problem h3").inner_text() == "Problem 3"
        assert page.evaluate("document.activeElement.id") == "problem"
        assert page.locator("#problems [aria-current=true]").count() == 1
        assert page.locator("#problem .question").inner_text().endswith("What is 3 + 3?")
        assert len(cards(page)) == 5
        tops = page.locator(".card").evaluate_all("found => found.map(one => one.getBoundingClientRect().top)")
        assert len(set(tops)) < 5
        scores = page.locator(".card dd:first-of-type").all_inner_texts()
        values = [float(score.split()[0]) for score in scores]
        assert values == sorted(values, reverse=True)
        assert [score.split("rank ")[1] for score in scores] == [f"{rank} of 5)" for rank in range(1, 6)]
        assert page.locator(".card.chosen").count() == 2
        page.select_option("#by-rule", label="longest")
        assert page.locator("#by-rule").evaluate("found => found === document.activeElement")
        assert page.locator(".card.chosen .now").first.inner_text() == "longest × 1"
        assert page.locator(".card dd:first-of-type").all_inner_texts() != scores
        page.locator("text=Next").click()
        assert page.locator("#problem h3").inner_text() == "Problem 4"


def test_what_is_trained_is_marked_and_what_is_not_is_not(browser, path):
    with opened(browser, path) as one:
        card = one.page.locator(".card", has_text="qwen3-8b")
        assert card.locator("mark").inner_text() == f"{TEXTS[0]}<|im_end|>"
        assert card.locator("mark .end").inner_text() == "<|im_end|>"
        assert card.locator(".untrained").inner_text().endswith("<|im_start|>assistant\n")


def test_names_and_texts_are_shown_as_they_are_and_do_nothing(browser, tmp_path):
    small_sweep(tmp_path, names=HOSTILE, texts=TEXTS)
    with opened(browser, write_page(read_summaries([tmp_path]), tmp_path / NAME), "drawn") as one:
        page = one.page
        assert page.evaluate("window.hurt") is None
        assert page.locator("main script, main img, main b").count() == 0
        shown = [
            name.replace("\u202e", "[U+202E]").replace("\u2066", "[U+2066]").replace("\u200f", "[U+200F]")
            for name in HOSTILE
        ]
        assert sorted(cards(page)) == sorted(shown)
        assert page.locator("#teacher option").all_inner_texts()[1:] == [" ".join(name.split()) for name in shown]
        page.locator("#problems button").nth(1).click()
        texts = " ".join(page.locator(".card mark").all_inner_texts())
        assert "null [U+0000] half" in texts and "<script>window.hurt = 1</script>" not in texts
        assert HOSTILE[2] in texts
        page.select_option("#teacher", "1")
        assert cards(page) == [shown[1]]
        ticks = page.locator("text.legendtext").all_text_contents()
        assert any(tick.startswith("<script>window") for tick in ticks)


def test_themes_follow_the_system_until_one_is_chosen(browser, path):
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('div.plot .xtick text').style.fill"
    with opened(browser, path, "drawn", theme="dark") as one:
        page = one.page
        dark, dark_ink = page.evaluate(ground), page.evaluate(ink)
        assert page.locator("#theme").text_content() == "Light theme"
        page.locator("#theme").click()
        assert page.locator("html").get_attribute("data-theme") == "light"
        assert page.evaluate(ground) == "rgb(255, 255, 255)" != dark
        page.wait_for_timeout(50)
        assert page.evaluate(ink) != dark_ink
        page.reload()
        assert page.locator("html").get_attribute("data-theme") == "light"
    with opened(browser, path, theme="light") as one:
        assert one.page.evaluate(ground) == "rgb(255, 255, 255)"


def test_a_phone_needs_no_sideways_scrolling(browser, path):
    wide = "document.documentElement.scrollWidth"
    with opened(browser, path, "drawn", size=PHONE, is_mobile=True, has_touch=True) as one:
        page = one.page
        assert page.evaluate(wide) == PHONE["width"]
        accuracy = page.locator("table").first.locator("th", has_text="eval avg@4").bounding_box()
        assert accuracy["x"] + accuracy["width"] <= PHONE["width"]
        page.locator("#problems button").nth(1).tap()
        assert page.evaluate(OVERLAPPING) == 0
        tops = page.locator(".card").evaluate_all("found => found.map(one => one.getBoundingClientRect().top)")
        assert len(set(tops)) == 5  # below each other
        assert page.evaluate(wide) == PHONE["width"]
        assert page.locator(".modebar-btn").count() == 0
        small = page.locator("button:visible, select:visible").evaluate_all(
            "found => found.filter(one => one.getBoundingClientRect().height < 24).length"
        )
        assert small == 0


def test_print_is_light_narrow_and_complete(browser, path):
    widths = "[...document.querySelectorAll('div.plot svg.main-svg')].map(one => one.clientWidth)"
    with opened(browser, path, "opened", theme="dark") as one:  # before the lower plots are drawn
        page = one.page
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("html").get_attribute("data-theme") == "light"
        assert set(page.evaluate(widths)) == {670}
        assert page.locator("div.plot:not(:has(svg))").count() == 0
        assert not page.locator("nav").is_visible() and not page.locator("#filters").is_visible()
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("html").get_attribute("data-theme") == "dark"
        page.wait_for_selector("html[data-page=drawn]", state="attached")


def test_without_the_library_the_rest_works(browser, path, tmp_path):
    alone = tmp_path / NAME
    alone.write_bytes(path.read_bytes())
    one = Opened(browser, alone)
    one.page.wait_for_selector("html[data-page=opened]", state="attached")
    assert one.page.locator("div.plot .missing").count() == 12
    assert PLOTLY in one.page.locator("div.plot").first.inner_text()
    assert one.page.locator("#problems li").count() == 100
    assert all("ERR_FILE_NOT_FOUND" in error for error in one.errors)
    one.close()


def test_a_choice_above_a_plot_shows_another_view(browser, path):
    with opened(browser, path, "drawn") as one:
        page = one.page
        (block,) = page.locator(".plot-block", has=page.locator("h3", has_text="Scores by teacher")).all()
        before = block.locator("figcaption").inner_text()
        boxes = block.locator(".boxlayer .trace.boxes path.box")
        assert boxes.count() == 5
        path_before = boxes.first.get_attribute("d")
        block.locator("select").select_option(label=RULES[2])
        assert block.locator("figcaption").inner_text() != before
        assert boxes.count() == 5 and boxes.first.get_attribute("d") != path_before


def test_pools_are_browsed_one_at_a_time(browser, tmp_path):
    small_sweep(tmp_path / "a", seeds=(0,))
    small_sweep(tmp_path / "b", seeds=(0,), problems=5, names=("one", "two", "three"))
    with opened(browser, write_page(read_summaries([tmp_path]), tmp_path / NAME)) as one:
        page = one.page
        page.select_option("#teacher", label="phi-4")
        page.select_option("#pool", index=1)
        assert page.locator("#matches").inner_text() == "15 of 15 trajectories match, in 5 of 5 problems."
        assert page.locator("#teacher option").all_inner_texts() == ["any", "one", "two", "three"]
        assert sorted(cards(page)) == ["one", "three", "two"]
