"""The page of the demo in a real headless Chromium, with the shipped models: what a visitor does, and sees.

The scenes have one object, which the shipped models find and name nearly always; of several questions at least half must be
answered right, so that other weights of their kind pass too.
"""

import importlib.util
import json
import os
import shutil
import socket

import pytest
import torch
from PIL import Image

from demo.app import WEIGHTS
from demo.models import Models
from encoder.boxes import box_iou
from encoder.data.pictures import load_library
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene

if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("playwright") is None:
    reason = "gradio or playwright is not installed (the extras `demo` and `browser`); the page is not driven in a browser"
    pytest.skip(reason, allow_module_level=True)
if shutil.which("chromium") is None:
    pytest.skip("there is no chromium (apt-get install chromium); the page is not driven in a browser", allow_module_level=True)

from playwright.sync_api import Page, expect, sync_playwright

from demo.page import build_page, serve

FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync".split()
PATIENCE = 1000 * int(os.environ.get("BROWSER_SECONDS", 120))  # milliseconds; a machine may be busy
SCENES = 4
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def scenes():
    library = PictureLibrary(load_library("base", seed=0)[0])
    return [draw_scene(SceneConfig(num_objects=(1, 1)), library, 7, index, "page") for index in range(SCENES)]


@pytest.fixture(scope="module")
def address():
    page = build_page(Models([WEIGHTS / "mllm_cloc", WEIGHTS / "mllm_clip"], WEIGHTS / "cloc"), 0.15)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve(page, "127.0.0.1", port)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture()
def page(browser, address):
    errors = []
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.goto(address, timeout=PATIENCE)
    expect(page.locator("#board img").first).to_be_visible()
    yield page
    page.close()
    assert errors == []


def upload(page: Page, path) -> None:
    page.set_input_files("#picture input[type=file]", str(path))


def put(page: Page, scene, folder) -> None:
    """Uploads a scene, and waits until it is on the board."""
    before = page.get_attribute("#board img >> nth=0", "src")
    scene.image.save(folder / "scene.png")
    upload(page, folder / "scene.png")
    page.wait_for_function("(before) => document.querySelector('#board img').src !== before", arg=before)


def drag(page: Page, scene, box) -> None:
    """Draws a box, xyxy in pixels of the scene, with the mouse."""
    edge = page.locator("#board .sheet").first.bounding_box()
    across, down = edge["width"] / scene.image.width, edge["height"] / scene.image.height
    x1, y1, x2, y2 = (value * scale for value, scale in zip(box, (across, down) * 2, strict=True))
    page.mouse.move(edge["x"] + x1, edge["y"] + y1)
    page.mouse.down()
    page.mouse.move(edge["x"] + (x1 + x2) / 2, edge["y"] + y2)
    page.mouse.move(edge["x"] + x2, edge["y"] + y2)
    page.mouse.up()


def ask(page: Page, question: str | None = None) -> str:
    """Asks, waits for the whole answer, and returns its words."""
    if question is not None:
        page.fill("#question textarea", question)
    count = page.locator("#chat .bot.message").count()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#chat .bot.message")).to_have_count(count + 1)
    expect(page.locator("#status")).not_to_contain_text("answering")
    return page.locator("#chat .bot.message").last.inner_text()


def drawn_boxes(page: Page, pane: int = 0) -> dict[int, list[float]]:
    """The boxes that the page's picture shows, as the browser has laid them out, xyxy in pixels of the scene."""
    found = page.evaluate(
        """(index) => {
          const pane = document.querySelectorAll("#board .pane")[index], image = pane.querySelector("img");
          const view = pane.querySelector("svg").viewBox.baseVal, frame = image.getBoundingClientRect();
          return [...pane.querySelectorAll("g.mark:not(.past)")].map((group) => {
            const edge = group.querySelectorAll("rect")[1].getBoundingClientRect();
            const x = (value) => ((value - frame.left) / frame.width) * view.width;
            const y = (value) => ((value - frame.top) / frame.height) * view.height;
            const number = [...group.classList].find((word) => /^n[0-9]+$/.test(word)).slice(1);
            return [Number(number), [x(edge.left), y(edge.top), x(edge.right), y(edge.bottom)]];
          });
        }""",
        pane,
    )
    return {number: box for number, box in found}


def iou(box, other) -> float:
    return float(box_iou(torch.tensor([box], dtype=torch.float32), torch.tensor([other], dtype=torch.float32))[0, 0])


def test_a_visitor_marks_a_place_asks_what_and_where_and_sees_the_boxes(page, scenes, tmp_path):
    named = found = 0
    for scene in scenes:
        (item,) = scene.objects
        put(page, scene, tmp_path)
        drag(page, scene, item.box)
        expect(page.locator("#question textarea")).to_have_value("What is [1]?")
        assert iou(drawn_boxes(page)[1], item.box) > 0.9  # the drawn box is on the page's picture
        named += item.name in ask(page).splitlines()
        ask(page, f"Where is the {item.name}?")
        boxes = drawn_boxes(page)
        found += any(iou(box, item.box) > 0.5 for number, box in boxes.items() if number > 1)
        for number in set(boxes) - {1}:  # the words of a box have its colour
            words = page.eval_on_selector(f"#chat .chip.n{number}", "(node) => getComputedStyle(node).backgroundColor")
            line = page.eval_on_selector(f"#board g.n{number} rect:last-child", "(node) => getComputedStyle(node).stroke")
            assert words == line
    assert named >= SCENES // 2 and found >= SCENES // 2


def test_words_and_box_light_up_together_and_both_models_are_drawn(page, scenes, tmp_path):
    put(page, scenes[0], tmp_path)
    said = ask(page, f"Where is the {scenes[0].objects[0].name}?")
    assert "mllm_cloc" in said and "mllm_clip" in said
    numbers = [set(drawn_boxes(page, pane)) for pane in (0, 1)]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]
    for pane, shown in enumerate(numbers):
        number = min(shown)
        page.locator(f"#chat .chip.n{number}").first.hover()
        expect(page.locator(f"#board .pane:nth-child({pane + 1}) g.n{number}")).to_have_class(f"mark n{number} lit")
        page.locator("#status").hover()
        page.locator(f"#board .tag.n{number}").hover()
        assert "lit" in page.locator(f"#chat .chip.n{number}").first.get_attribute("class")


def test_points_scribbles_undo_and_the_encoder_alone(page, scenes, tmp_path):
    (item,) = scenes[0].objects
    put(page, scenes[0], tmp_path)
    edge = page.locator("#board .sheet").first.bounding_box()
    scale = edge["width"] / scenes[0].image.width
    x, y = (edge[axis] + scale * (item.box[i] + item.box[i + 2]) / 2 for i, axis in enumerate("xy"))
    page.mouse.click(x, y)
    expect(page.locator("#board .pane:first-child .tag")).to_have_count(1)
    page.click(".pen")
    page.mouse.move(x - 20, y - 20)
    page.mouse.down()
    for step in range(5):
        page.mouse.move(x + 10 * step, y + 10 * (step % 2))
    page.mouse.up()
    expect(page.locator("#board .pane:first-child .tag")).to_have_count(2)
    page.get_by_role("button", name="Undo mark").click()
    expect(page.locator("#board .pane:first-child .tag")).to_have_count(1)
    page.click(".pen")
    drag(page, scenes[0], item.box)
    page.get_by_role("tab", name="Encoder alone").click()
    page.fill("#labels textarea", f"{item.name}\nairport\nsofa")
    page.get_by_role("button", name="Rank the labels").click()
    expect(page.locator("#ranking table")).to_have_count(2)
    assert item.name in page.locator("#ranking table").last.inner_text()
    page.fill("#phrase textarea, #phrase input", item.name)
    page.get_by_role("button", name="Find its box").click()
    expect(page.locator("#found")).to_contain_text("cosine")
    assert len(drawn_boxes(page)) == 3


def test_the_chat_and_the_picture_can_be_saved(page, scenes, tmp_path):
    put(page, scenes[0], tmp_path)
    drag(page, scenes[0], scenes[0].objects[0].box)
    ask(page, "What is [1]?")
    kept = {}
    for name in ("Save chat", "Save picture"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
        kept[name] = tmp_path / download.value.suggested_filename
    record = json.loads(kept["Save chat"].read_text())
    assert iou(record["marks"][0]["box"], scenes[0].objects[0].box) > 0.9 and record["turns"][0]["question"] == "What is [1]?"
    with Image.open(kept["Save picture"]) as picture:
        assert max(picture.size) == 640


def test_what_is_no_picture_is_a_sentence_and_the_page_lives_on(page, scenes, tmp_path):
    (tmp_path / "nothing.png").touch()
    upload(page, tmp_path / "nothing.png")
    expect(page.locator("#status")).to_contain_text("cannot be read")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    upload(page, tmp_path / "huge.png")
    expect(page.locator("#status")).to_contain_text("megapixels")
    put(page, scenes[1], tmp_path)
    assert ask(page, "我在哪里?")
    page.set_viewport_size({"width": 390, "height": 844})  # a phone's: nothing to scroll sideways
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_models_are_loaded_again_in_few_bits(page, scenes, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    put(page, scenes[0], tmp_path)
    page.get_by_role("button", name="Settings").click()
    for weights in ("4-bit weights", "full weights"):
        page.get_by_label("Language model").click()
        page.get_by_role("option", name=weights).click()
        page.get_by_role("button", name="Load again").click()
        expect(page.locator("#status")).to_contain_text(f"The models are on cpu, with {weights}.")
        assert ask(page, "Where is it?")
