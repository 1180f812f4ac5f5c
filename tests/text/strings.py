"""Random texts of all kinds of characters, and the awkward ones mixed in: the same for the same seed."""

import random

AWKWARD = [
    *(
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|im_end|>",
        "<|endoftext|>",
        "[INST]",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
    ),
    *(
        " ",
        "  ",
        "   ",
        " " * 7,
        " " * 31,
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u200b",
    ),
    *("\0", "\x1b[0m", "\x7f", "\x85", "\ufeff", "\ufffd", "▁", "▁▁ "),
    *(
        "日本語",
        "中文字",
        "한국어",
        "ไทย",
        "नमस्ते",
        "مرحبا",
        "שלום",
        "Привет",
        "é",
        "naïve",
        "ß",
        "ﬁ",
        "İ",
        "Ǆ",
    ),
    *(
        "e\u0301",
        "\u0300",
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "🏽",
        "don't",
        "I'LL",
        "we'Ve",
        "'ſ",
        "12345",
        "3.14",
        "½",
        "²",
    ),
    *(
        "the ",
        " Once upon a time",
        "def f(x):\n    return x",
        "====",
        "-----",
        "aaaaaaa",
        "ttttt",
        "hello, world!",
    ),
]


def random_strings(count: int, seed: int) -> list[str]:
    """A quarter of the characters come from each of: the awkward, ASCII, the first plane, all planes."""
    chance = random.Random(seed)

    def some(low: int, high: int) -> str:
        codes = (chance.randint(low, high) for _ in range(chance.randint(1, 6)))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    def part() -> str:
        kind = chance.random()
        if kind < 0.4:
            return chance.choice(AWKWARD)
        return some(*((32, 126) if kind < 0.6 else (0, 0xFFFF) if kind < 0.8 else (0, 0x10FFFF)))

    return ["".join(part() for _ in range(chance.randint(0, 8))) for _ in range(count)]
