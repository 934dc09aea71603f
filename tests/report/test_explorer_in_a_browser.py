"""`explorer.html` in a real browser: a reader drags, types, presses keys, copies, and reads the front's numbers."""

import json
import os
import shutil

import numpy as np
import pytest
from searches import made_up_search

from supershaper_hf.report.explorer import explorer_page, write_explorer
from supershaper_hf.report.findings import Findings


playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make test` installs it")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium was found: `apt-get install chromium`, or name the program in the variable CHROMIUM",
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
DASH = "\N{EN DASH}"  # in tables, where there is no measurement
DESKTOP, PHONE = {"width": 1100, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return made_up_search(tmp_path_factory.mktemp("explorer") / "search", latency=True, layers=6)


@pytest.fixture(scope="module")
def findings(searched):
    return Findings.read(searched)


@pytest.fixture
def open_page(browser):
    """Open a page; afterwards, check that it has fetched nothing and that no error was logged."""
    contexts, requests, problems = [], [], []

    def open_page(file, viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, **options)
        context.on("request", lambda request: requests.append(request.url))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(file.as_uri())
        addresses.append(file.as_uri())
        return page

    addresses = []
    yield open_page
    for context in contexts:
        context.close()
    assert requests == addresses
    assert problems == []


@pytest.fixture
def page(open_page, searched):
    return open_page(write_explorer(searched, supernet="user/supernet"))


def figures(page):
    """The figures that a reader sees, by name."""
    terms, values = page.locator("#figures dt").all_inner_texts(), page.locator("#figures dd").all_inner_texts()
    return dict(zip(terms, values, strict=True))


def measures(page, bars):
    """The top and the height of bars."""
    return np.array(page.locator(bars).evaluate_all("n => n.map(n => ['y', 'height'].map(k => +n.getAttribute(k)))"))


def chosen(page):
    """The shape that the bars show, each by its height."""
    picture = page.locator("#bars svg").get_attribute("aria-label")
    widths = [int(width) for width in picture.split(": ")[1].split(", ")]
    bars, full = measures(page, "#bars .bar"), measures(page, "#bars .ghost")
    assert bars[:, 1] == pytest.approx(full[:, 1] * np.array(widths) / 48)
    assert bars.sum(1) == pytest.approx(full.sum(1))  # they stand on one line
    assert page.locator("#bars .width").all_text_contents() == [str(width) for width in widths]
    return widths


def assert_shows(page, findings, shape):
    """Every part of the page speaks of `shape`, with the numbers of the search."""
    assert chosen(page) == shape
    (row,), measure = findings.rows(np.array([shape])), findings.measure
    shown = figures(page)
    assert shown["parameters"] == f"{row['parameters']:,}"
    slope = row[f"predicted_{measure.shown}"] if measure.name == "loss" else 1
    predicted = f"{row[f'predicted_{measure.shown}']:.{measure.digits}f}"
    deviation = f"{slope * row['predicted_deviation']:.{measure.digits}f}"
    assert shown[f"predicted {measure.title}"] == f"{predicted} ± {deviation}"
    measured = row[f"measured_{measure.shown}"]
    expected = "not measured" if measured is None else f"{measured:.{measure.digits}f}"
    assert shown[f"measured {measure.title}"] == expected
    assert f"extract_from_folder(supernet, {shape}, " in page.locator("#code").inner_text()
    summary = page.locator("#summary")  # it waits for the end of a drag
    playwright.expect(summary).to_contain_text(f"the best shape is {shape}: {measure.title} {predicted} ± {deviation}")
    cells = page.locator("#comparison tbody tr").first.locator("td").all_inner_texts()
    assert cells[1:] == [predicted, DASH if measured is None else expected]


def test_keys_walk_along_the_front(page, findings):
    front = findings.front("parameters").shapes.tolist()
    budget = page.get_by_role("slider")
    budget.press("Home")
    assert_shows(page, findings, front[0])
    for shape in front[1:4]:
        budget.press("ArrowRight")
        assert_shows(page, findings, shape)
    budget.press("End")
    assert_shows(page, findings, front[-1])
    budget.press("ArrowLeft")
    assert_shows(page, findings, front[-2])
    assert budget.get_attribute("aria-valuetext") == f"{findings.space.num_parameters(front[-2]):,} parameters"


def test_distances_are_read_like_perplexities(open_page, tmp_path):
    folder = made_up_search(tmp_path / "search", "distance")
    page, findings = open_page(write_explorer(folder, supernet="user/supernet")), Findings.read(folder)
    assert page.get_by_role("radio").count() == 2  # no latency was measured
    page.get_by_role("slider").press("End")
    assert_shows(page, findings, findings.front("parameters").shapes[-1].tolist())
    assert "perplexity" not in page.locator("main").inner_text()


def test_drag_walks_along_the_front(page, findings):
    """The hand holds the knob and moves it over the whole length."""
    front = findings.front("parameters").shapes.tolist()
    slider = page.get_by_role("slider")
    slider.press("Home")
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + box["height"] / 2)
    page.mouse.down()
    seen = []
    for part in np.linspace(0, 1, 15):
        page.mouse.move(box["x"] + 9 + part * (box["width"] - 18), box["y"] + box["height"] / 2)
        seen.append(front.index(chosen(page)))
    page.mouse.up()
    assert_shows(page, findings, front[-1])
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert len(set(seen)) > 7


def test_drag_on_the_chart_moves_the_budget(page, findings):
    front, chart = findings.front("parameters"), page.locator("#chart svg").bounding_box()
    costs = front.costs["parameters"]
    left, right = chart["x"] + 66 + 8, chart["x"] + chart["width"] - 10 - 8  # the ends of the front
    page.mouse.move(left, chart["y"] + 50)
    page.mouse.down()
    assert_shows(page, findings, front.shapes[0].tolist())
    for part in (0.3, 0.7):
        page.mouse.move(left + part * (right - left), chart["y"] + 90)
        typed = int(page.get_by_role("textbox").input_value().replace(",", ""))
        assert typed == pytest.approx(costs[0] + part * (costs[-1] - costs[0]), abs=1 + np.ptp(costs) / (right - left))
        assert_shows(page, findings, front.best(typed))
    page.mouse.up()
    page.mouse.move(left, chart["y"] + 50)
    assert chosen(page) == front.best(typed)


def axes(page):
    """What the ticks of the chart say: (cost, x) and (quality, y) of each."""
    texts = page.locator("#chart text:not([transform])").evaluate_all(
        "nodes => nodes.map(n => [...['x', 'y', 'text-anchor'].map(name => n.getAttribute(name)), n.textContent])"
    )
    ticks = [(float(x), float(y), anchor, float(text)) for x, y, anchor, text in texts[:-1]]  # the last names the axis
    return (
        np.array([(value, x) for x, _, anchor, value in ticks if anchor == "middle"]),
        np.array([(value, y - 4) for _, y, anchor, value in ticks if anchor == "end"]),  # a text's middle is its line
    )


def test_points_lie_where_the_axes_say(page, findings):
    (costs, x), (values, y) = (ticks.T for ticks in axes(page))
    assert len(costs) > 2
    assert len(values) > 2
    place_x, place_y = np.polyfit(costs * 1e6, x, 1), np.polyfit(np.log(values), y, 1)
    assert place_x[0] > 0 > place_y[0]  # to the right and upwards
    front = findings.front("parameters")
    for key, i in (("Home", 0), ("End", -1)):
        page.get_by_role("slider").press(key)
        mark, line = page.locator("#chart .chosen"), page.locator("#chart .budget")
        expected = np.polyval(place_x, front.costs["parameters"][i]), np.polyval(place_y, front.losses[i])
        found = [float(mark.get_attribute(name)) for name in ("cx", "cy")]
        assert found == pytest.approx(expected, abs=0.5)
        assert line.get_attribute("d").startswith(f"M{mark.get_attribute('cx')} ")
    finite = [record for record in findings.records if np.isfinite(record["perplexity"])]
    expected = np.polyval(place_y, np.log([record["perplexity"] for record in finite]))
    dots = page.locator("#chart .measured").evaluate_all("nodes => nodes.map(node => Number(node.getAttribute('cy')))")
    assert dots == pytest.approx(expected, abs=0.5)
    hand_crafted = page.locator("#chart .other").evaluate_all("nodes => nodes.map(node => node.getAttribute('d'))")
    assert len(hand_crafted) == 8
    largest = findings.rows(np.array([[48] * 6]))[0]["predicted_loss"]
    assert float(hand_crafted[0].split()[1].split("l")[0]) + 5 == pytest.approx(np.polyval(place_y, largest), abs=0.5)


def test_typed_budget_is_answered_as_in_python(page, findings):
    front, typed = findings.front("parameters"), page.get_by_role("textbox")
    costs = front.costs["parameters"]
    for budget in (int(costs[5]) - 1, int(costs[5]), int(costs[-1]) * 2):
        typed.fill(f"{budget:,}")
        typed.press("Enter")
        assert_shows(page, findings, front.best(budget))
        assert typed.input_value() == f"{budget:,}"


def test_budget_that_no_shape_meets_is_refused_with_the_reason(page, findings):
    before, typed, problem = chosen(page), page.get_by_role("textbox"), page.locator("#problem")
    cheapest = f"{findings.space.num_parameters(findings.space.smallest):,}"
    for nonsense in ("", "many", "-5", "1000", "nan"):
        typed.fill(nonsense)
        typed.blur()
        assert problem.inner_text() == f"Give a number of at least {cheapest} parameters, the cheapest."
        assert problem.get_attribute("role") == "alert"
        assert typed.get_attribute("aria-invalid") == "true"
        assert chosen(page) == before
        page.get_by_role("slider").press("ArrowRight")
        assert problem.text_content() == ""
        assert typed.get_attribute("aria-invalid") == "false"
        page.get_by_role("slider").press("ArrowLeft")


def test_each_cost_has_its_own_front(page, findings):
    for unit, cost, scale in (("GFLOPs", "flops", 1e9), ("ms", "latency", 1e-3)):
        page.get_by_role("radio", name=unit).check()
        front = findings.front(cost)
        page.get_by_role("slider").press("Home")
        assert_shows(page, findings, front.shapes[0].tolist())
        page.get_by_role("slider").press("ArrowRight")
        assert_shows(page, findings, front.shapes[1].tolist())
        typed = page.get_by_role("textbox")
        assert float(typed.input_value()) == pytest.approx(front.costs[cost][1] / scale, rel=1e-3)
        middle = (front.costs[cost][0] + front.costs[cost][-1]) / 2
        typed.fill(str(middle / scale))
        typed.press("Enter")
        assert_shows(page, findings, front.best(middle))


def test_table_is_the_front(page, findings):
    front = findings.front("parameters")
    page.get_by_text(f"All {len(front)} shapes").click()
    table = page.locator("#front-table table")
    rows = [line.split("\t") for line in table.locator("tbody").inner_text().splitlines()]
    digits = findings.measure.digits
    shown = findings.measure.show(front.losses)
    assert [row[0] for row in rows] == [f"{cost:,}" for cost in front.costs["parameters"].tolist()]
    assert [json.loads(row[-1]) for row in rows] == front.shapes.tolist()
    assert [row[-4] for row in rows] == [f"{value:.{digits}f}" for value in shown]
    page.get_by_role("slider").press("Home")
    assert table.locator("[aria-current]").all_inner_texts() == ["\t".join(rows[0])]


def test_comparison_names_the_best_measured_and_hand_crafted_shapes(page, findings):
    budget = findings.space.num_parameters([36] * 6)
    page.get_by_role("textbox").fill(str(budget))
    page.get_by_role("textbox").press("Enter")
    lines = page.locator("#comparison tbody th").all_inner_texts()
    shapes = {name: json.loads(shape) for name, shape in (line.split("\n") for line in lines)}
    assert shapes["best predicted"] == findings.front("parameters").best(budget)
    assert shapes["best measured"] == findings.best_measured("parameters", budget)
    for name in ("rectangle", "diamond", "lower triangle", "supershaper"):
        assert shapes[name] == findings.space.named_shape(name.replace(" ", "_"), budget)


def test_comparison_says_where_no_hand_crafted_shape_is_cheap_enough(open_page, tmp_path):
    page = open_page(write_explorer(made_up_search(tmp_path / "search", drop_rate=0.3, layers=4)))
    page.get_by_role("slider").press("Home")
    lines = page.locator("#comparison tbody tr").all_inner_texts()
    assert "rectangle\tnone is this cheap" in lines
    assert 0 in chosen(page)


def test_copy_button_copies_the_code(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").press("Enter")
    playwright.expect(page.locator("#copied")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#code").text_content()


def test_where_copying_is_forbidden_the_code_is_selected(page):
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('forbidden')); }")
    page.get_by_role("button", name="Copy").click()
    playwright.expect(page.locator("#copied")).to_contain_text("copy them with Ctrl+C")
    assert page.evaluate("getSelection().toString()").strip() == page.locator("#code").inner_text().strip()


def test_everything_is_reached_by_the_tab_key_and_has_a_name(page):
    reached = []
    page.locator("body").press("Tab")
    while (focused := page.locator(":focus")).count() and len(reached) < 20:
        reached.append(focused.evaluate("node => node.id || node.getAttribute('aria-labelledby') || node.tagName"))
        page.keyboard.press("Tab")
    assert reached == ["INPUT", "typed", "budget", "copy", "code-title", "comparison-title", "SUMMARY"]
    tree = page.locator("main").aria_snapshot()
    for name in ('slider "Budget', 'textbox "at most"', 'radio "parameters"', 'button "Copy"', 'group "Budget in"'):
        assert name in tree
    for picture in page.get_by_role("img").all():
        assert picture.get_attribute("aria-label") or picture.get_attribute("aria-labelledby")


@pytest.mark.parametrize("layers", [6, 16])
def test_page_fits_a_phone(open_page, tmp_path, layers):
    folder = made_up_search(tmp_path / "search", layers=layers)
    page = open_page(write_explorer(folder, supernet="a-user-with-a-long-name/a-supernet-with-a-long-name"), PHONE)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for part in ("#budget", "#chart svg", "#bars svg", "#copy"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
    page.mouse.wheel(0, 900)
    page.wait_for_function("scrollY > 300")
    assert page.get_by_role("slider").bounding_box()["y"] >= 0  # the budget stays in sight


def test_dark_and_light_have_enough_contrast(open_page, searched):
    """At least 4.5 to 1 for text, and 3 to 1 for lines and marks, as WCAG asks."""
    for scheme in ("light", "dark"):
        page = open_page(write_explorer(searched), color_scheme=scheme)
        style = "name => getComputedStyle(document.documentElement).getPropertyValue(name)"
        colours = {name: luminance(page.evaluate(style, f"--{name}")) for name in ("page", "card", "text", "soft")}
        marks = {name: luminance(page.evaluate(style, f"--{name}")) for name in ("front", "chosen", "other", "dot")}
        assert (colours["card"] > 0.9) == (scheme == "light")
        assert (colours["card"] < 0.1) == (scheme == "dark")
        for surface in ("page", "card"):
            assert min(contrast(colours[name], colours[surface]) for name in ("text", "soft")) >= 4.5
            assert min(contrast(mark, colours[surface]) for mark in marks.values()) >= 3
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red, green, blue = (int(part) for part in body.strip("rgb()").split(","))
        assert luminance(f"#{red:02x}{green:02x}{blue:02x}") == colours["page"]


def luminance(colour):
    digits = colour.strip().removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_name_with_markup_is_text(open_page, findings, tmp_path):
    name = "</script><b>bold</b>\"'<!--"
    (tmp_path / "page.html").write_text(explorer_page(findings, supernet=name))
    page = open_page(tmp_path / "page.html")
    assert page.locator("h1").inner_text() == f"Choose a shape of {name}"
    assert json.dumps(name) in page.locator("#code").inner_text()
    assert page.locator("b").count() == 0
