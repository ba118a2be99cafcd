"""Strategies: what people, programs and accidents put into files, names and options."""

from hypothesis import strategies as st

from dit_accel.batch.jobs import KEYS

LETTERS = st.text(st.characters(exclude_categories=()), max_size=12)
SIGNS = ("", " ", ".", "..", "/", "~", "-", "--", "#", "%s", "{}", "$HOME", '"', '"a', "\r")
MARKS = (
    "[/b]",
    "[bold]",
    ":cat:",
    "a\0b",
    "\ufeffa",
    "a\u2028b",
    "\ud800",
    "null",
    "true",
    "[]",
    "[1, 2]",
)
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "0.5",
    "1.5",
    "3",
    "1_000",
    "٣",
    "9" * 40,
    "0x10",
)
NAMES = ("cat.mp4", "a/b", "../a", "con", "x.dense", "猫" * 120, "n" * 300, "a cat", "кот", "🚀")
METHODS = (
    "dense",
    "topk",
    "topk:",
    "topk:fast",
    "pooled",
    "sla",
    "x.json",
    "none.png",
    "0x0",
    "16x16",
)
KNOWN = st.sampled_from([*SIGNS, *MARKS, *NUMBERS, *NAMES, *METHODS])
TEXT = st.one_of(KNOWN, LETTERS)
NUMBER = st.one_of(
    st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**63, 10**400, -0.0])
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
VALUE = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
GOOD = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a cat", "a dog", "красный кот", "[/b]"])},
    optional={
        "seed": st.integers(0, 3),
        "method": st.sampled_from(["dense", "topk", "pooled:fast"]),
        "name": st.sampled_from(["one", "Two.png", "three.mp4", "猫"]),
    },
)
JOB = st.one_of(
    GOOD,
    st.builds(
        lambda good, more: {**good, **more},
        GOOD,
        st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=2),
    ),
    st.dictionaries(st.one_of(st.sampled_from([*KEYS, "defaults"]), TEXT), VALUE, max_size=4),
    VALUE,
)
