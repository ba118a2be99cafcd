"""What a stranger may type, and whether a page shows it as text and runs none of it."""

from html.parser import HTMLParser

NASTY = "</title></pre><script>alert(1)</script> {{ 7*7 }} {% raw %} ${7*7} &lt; \"' onload=x <img>"


class Reader(HTMLParser):
    """The elements of a page, their attributes, and all that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.shown.append(data)


def shown_as_text(nasty: str, plain: str) -> bool:
    """Whether a page made with NASTY has the elements of the same page made with plain words, and
    the words among what is shown. AssertionError where it has others."""
    found, wanted = Reader(nasty), Reader(plain)
    assert found.tags == wanted.tags
    assert [name for name, _ in found.attributes] == [name for name, _ in wanted.attributes]
    return any(NASTY in text for text in found.shown)
