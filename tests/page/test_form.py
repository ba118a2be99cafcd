"""The form: what may be typed, what is refused and where, what it costs, what the model draws."""

import re

import pytest
from visits import DONE, finished, prompt, settings

from dit_accel.app.catalog import card

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", "5000x256", "Width is a whole number from 16 to 1280, not 5000."),
        ("steps", "5000", "Steps is a whole number from 1 to 1000, not 5000."),
        ("frames", "many", "Frames is a whole number, not 'many'."),
        ("guidance", "-3", "Guidance is a number from 0 to 100, not -3.0."),
        ("right-keep", "7", "keep is the share of key blocks kept"),
        ("prompt", "   ", "The prompt is empty: say what to show."),
    ],
)
def test_p1_what_is_out_of_range_is_said_at_its_field(any_page, field, value, words):
    page = any_page
    settings(page)
    page.fill(f"#{field}", value)
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert words in page.text("#note")
    focus = page.js("return document.activeElement.id")
    assert focus in (field, "right-method") and page.js("return document.activeElement.ariaInvalid")
    assert not page.js("return document.querySelector('#go').disabled")


def test_p2_a_chip_sets_what_its_clips_were_made_with(any_page):
    page = any_page
    for number in range(1, 1 + page.js("return document.querySelectorAll('#chips button').length")):
        page.click(f"#chips button:nth-of-type({number})")
        page.until(
            f"return document.querySelector('#chips button:nth-of-type({number})').ariaPressed"
            " == 'true'"
        )
        shown = page.text("figure.right .label")
        method, keep = re.match(r"([a-z]+)[^,]*(?:, keep ([\d.]+))?", shown).groups()
        assert page.js("return document.querySelector('#right-method').value") == method
        box = "const k = document.querySelector('#right-keep'); return k.value || k.placeholder"
        assert keep is None or float(page.js(box)) == float(keep)


def test_p4_work_is_bounded_and_told_before(page):
    page.fill("#prompt", prompt())
    settings(page)
    page.until("return document.querySelector('#cost').textContent.includes('192 tokens × 4')")
    assert re.search(r"about \d+ s on this CPU", page.text("#cost"))
    settings(page, size="1280x1280", frames="129", steps="100")
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "211,200 tokens × 100 steps = 21,120,000; this page takes 500,000" in page.text("#note")


def test_p5_what_it_can_draw_and_a_word_it_does_not_know(any_page):
    page = any_page
    draws = card(None).facts()["draws"]
    page.click("#draws summary")
    assert page.js("return document.querySelectorAll('#names button').length") == len(draws)
    name = draws[len(draws) // 2][0]
    page.fill("#find", name)
    names = page.js("return [...document.querySelectorAll('#names button')].map(b => b.innerText)")
    assert name in names and len(names) < len(draws)
    page.fill("#prompt", draws[0][1])
    page.js(
        "[...document.querySelectorAll('#names button')].find(b => b.innerText == arguments[0])"
        ".click()",
        name,
    )
    assert name in page.js("return document.querySelector('#prompt').value")
    page.until("return document.querySelector('#trouble').textContent == ''")
    page.fill("#prompt", "a zeppelin on a blue background")
    page.until("return document.querySelector('#trouble').textContent.includes('zeppelin')")


def test_p5_every_method_has_its_line_and_sla_says_what_it_needs(page):
    options = "return [...document.querySelector('#right-method').options].map(o => o.value)"
    for method in page.js(options):
        page.fill("#right-method", method)
        assert len(page.text("#right-about")) > 20
    page.fill("#right-method", "sla")
    assert "fine-tuned" in page.text("#right-about")
    assert "CPU only" in page.text("#machine")


def test_what_a_visitor_types_is_shown_and_never_run(page):
    nasty = "<img src=x onerror=\"document.title='run'\"> {{ 7*7 }} ${7*7} <b>bold</b>"
    finished(page, negative=nasty)
    page.fill("#prompt", nasty)
    page.until("return document.querySelector('#trouble').textContent.includes('img')")
    page.click("#go")
    page.until(DONE)
    page.js("location.hash = arguments[0]", "prompt=" + nasty + "&__proto__.x=1")
    page.reload()
    assert page.js("return document.title") != "run" and page.js("return ({}).x") is None
    assert page.severe() == []


def test_a_first_picture_is_taken_and_removed(page, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "no.png").write_text("no picture")
    page.js("for (const d of document.querySelectorAll('details')) d.open = true")
    page.keys("#image", str(tmp_path / "no.png"))
    page.until("return document.querySelector('#note').textContent.includes('no picture')")
    settings(page)
    page.keys("#image", str(tmp_path / "red.png"))
    page.until("return document.querySelector('[name=image]').value")
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "takes no image" in page.text("#note")
    page.click("[data-for=image]")
    assert page.js("return document.querySelector('[name=image]').value") == ""


def test_a_random_seed(page):
    page.click("#dice")
    assert page.js("return Number(document.querySelector('#seed').value)") > 0


def test_a_checkpoint_is_run_as_trained_unless_a_method_was_chosen(page):
    method = "return document.querySelector('#right-method').value"
    settings(page)
    page.fill("#checkpoint", "/no/such.pth")
    assert page.js(method) == "trained" and "trained for" in page.text("#right-about")
    page.until("return document.querySelector('#cost').textContent.includes('once the checkpoint')")
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "There is no checkpoint /no/such.pth: give a file" in page.text("#note")
    page.fill("#checkpoint", "")
    assert page.js(method) == "shared"
    page.fill("#right-method", "trained")
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "name one under Model" in page.text("#note")
    assert page.js("return document.activeElement.id") == "right-method"
    page.fill("#right-method", "topk")
    page.fill("#checkpoint", "mine.pth")
    assert page.js(method) == "topk"
