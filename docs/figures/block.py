"""Draws docs/figures/block-light.svg and block-dark.svg: one Llama, from tokens to logits, down the page.

The thick line at the left is the residual stream. Each branch reads it through a norm and adds its result back.
The SVG is written as text, with no library, so that the same code always gives the same bytes:

    python docs/figures/block.py
"""

from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 720
STREAM = 84  # x of the residual stream
LEFT, RIGHT = 190, 664  # x of the branches' boxes
BOX, GAP = 58, 24  # height of a box, and of the arrow to the next one

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# ink, muted text, residual stream, frame; then (fill, border) of each kind of box. Blue, vermilion and green of the
# Okabe-Ito palette, which colour-blind people can tell apart; every box also says in words what it is.
THEMES = {
    "light": {
        "ink": "#1f2328",
        "muted": "#59636e",
        "stream": "#1f2328",
        "frame": ("#f6f8fa", "#d1d9e0"),
        "norm": ("#ffffff", "#818b98"),
        "attention": ("#e3f0f9", "#0072b2"),
        "feed_forward": ("#fdeee3", "#c2540a"),
        "vocabulary": ("#e2f5ee", "#00835f"),
    },
    "dark": {
        "ink": "#f0f6fc",
        "muted": "#9198a1",
        "stream": "#f0f6fc",
        "frame": ("#151b23", "#3d444d"),
        "norm": ("#212830", "#9198a1"),
        "attention": ("#10304a", "#56b4e9"),
        "feed_forward": ("#42240f", "#f0883e"),
        "vocabulary": ("#0c3a2d", "#2fbf95"),
    },
}


def draw(theme: str) -> str:
    """The whole picture as SVG text, on a transparent background."""
    colours = THEMES[theme]
    parts: list[str] = []

    def add(tag: str, text: str = "", **attributes: object) -> None:
        pairs = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        parts.append(f"  <{tag}{pairs}>{text}</{tag}>" if text else f"  <{tag}{pairs}/>")

    def write(x: float, y: float, text: str, kind: str = "name", anchor: str = "middle") -> None:
        """Text centred on the height y. Kinds: name (of a box), note (muted), code (a weight's name)."""
        family, size, weight, fill = {
            "name": (SANS, 21, 600, colours["ink"]),
            "code": (MONO, 20, 600, colours["ink"]),
            "note": (SANS, 18, 400, colours["muted"]),
        }[kind]
        add("text", text, x=x, y=round(y + 0.35 * size, 1), font_family=family, font_size=size,
            font_weight=weight, fill=fill, text_anchor=anchor)  # fmt: skip

    def box(x0: float, x1: float, y: float, kind: str, name: str, note: str = "", code: bool = True) -> None:
        """A box whose top is y: its name and, to the right of it or below in narrow ones, a note."""
        fill, border = colours[kind]
        add("rect", x=x0, y=y, width=x1 - x0, height=BOX, rx=9, fill=fill, stroke=border, stroke_width=2)
        kind_of_name, middle = "code" if code else "name", (x0 + x1) / 2
        if not note:
            write(middle, y + BOX / 2, name, kind_of_name)
        elif x1 - x0 < 200:
            write(middle, y + BOX / 2 - 12, name, kind_of_name)
            write(middle, y + BOX / 2 + 14, note, "note")
        else:
            write(x0 + 18, y + BOX / 2, name, kind_of_name, "start")
            write(x1 - 18, y + BOX / 2, note, "note", "end")

    def line(points: str, colour: str, width: float = 2, arrow: bool = True) -> None:
        marker = {"marker_end": f"url(#arrow-{colour})"} if arrow else {}
        stroke = colours[colour] if colour in ("ink", "stream") else colours[colour][1]
        add("path", d=points, fill="none", stroke=stroke, stroke_width=width, **marker)

    def down(x: float, y: float, colour: str, length: float = GAP) -> None:
        line(f"M{x:g} {y:g}v{length - 3:g}", colour)  # 3 less: the head of the arrow reaches further

    def branch_off(y: float, colour: str) -> None:
        add("circle", cx=STREAM, cy=y, r=5, fill=colours["stream"])
        line(f"M{STREAM} {y:g}H{LEFT - 3}", colour)

    def plus(y: float, colour: str) -> None:
        line(f"M{LEFT} {y:g}H{STREAM + 20}", colour)
        add(
            "circle",
            cx=STREAM,
            cy=y,
            r=17,
            fill=colours["frame"][0],
            stroke=colours["stream"],
            stroke_width=3,
        )
        add(
            "path",
            d=f"M{STREAM - 9} {y:g}h18M{STREAM} {y - 9:g}v18",
            stroke=colours["stream"],
            stroke_width=3,
        )

    third = (RIGHT - LEFT - 32) / 3
    thirds = [(LEFT + i * (third + 16), LEFT + i * (third + 16) + third) for i in range(3)]
    half = (RIGHT - LEFT - 16) / 2
    halves = [(LEFT, LEFT + half), (RIGHT - half, RIGHT)]
    step = BOX + GAP

    top = 50  # of the embedding
    frame_top = top + BOX + 30
    attention = frame_top + 30  # the norm of the first branch; then qkv, RoPE, attention, wo
    feed_forward = attention + 5 * step + 14  # the norm of the second branch; then gate and up, product, down
    frame_bottom = feed_forward + 4 * step - GAP + 52
    last_norm = frame_bottom + 30
    head = last_norm + step

    fill, border = colours["frame"]
    add("rect", x=24, y=frame_top, width=WIDTH - 48, height=frame_bottom - frame_top, rx=16, fill=fill,
        stroke=border, stroke_width=2)  # fmt: skip
    line(f"M{STREAM} {top + BOX:g}V{last_norm - 6:g}", "stream", 5)

    write(STREAM, 22, "tokens")
    write(WIDTH - 24, 22, "token ids, (B, T)", "note", "end")
    down(STREAM, 34, "ink", top - 34)
    box(24, WIDTH - 24, top, "vocabulary", "tok_embeddings", "V × D: one vector for each token")

    branch_off(attention + BOX / 2, "norm")
    box(LEFT, RIGHT, attention, "norm", "RMSNorm", "attention_norm", code=False)
    y = attention + step
    for (x0, x1), name, note in zip(
        thirds, ("wq", "wk", "wv"), ("H queries", "K keys", "K values"), strict=True
    ):
        down((x0 + x1) / 2, y - GAP, "norm")
        box(x0, x1, y, "attention", name, note)
    y += step
    for x0, x1 in thirds[:2]:
        down((x0 + x1) / 2, y - GAP, "attention")
        down((x0 + x1) / 2, y + BOX, "attention")
    down(sum(thirds[2]) / 2, y - GAP, "attention", step + GAP)
    box(thirds[0][0], thirds[1][1], y, "attention", "RoPE", "turned by position", code=False)
    y += step
    box(LEFT, RIGHT, y, "attention", "softmax(q kᵀ / √hd) v", "causal", code=False)
    down((LEFT + RIGHT) / 2, y + BOX, "attention")
    y += step
    box(LEFT, RIGHT, y, "attention", "wo", "heads back to width D")
    plus(y + BOX / 2, "attention")

    branch_off(feed_forward + BOX / 2, "norm")
    box(LEFT, RIGHT, feed_forward, "norm", "RMSNorm", "ffn_norm", code=False)
    y = feed_forward + step
    for (x0, x1), name in zip(halves, ("w_gate", "w_up"), strict=True):
        down((x0 + x1) / 2, y - GAP, "norm")
        box(x0, x1, y, "feed_forward", name, "D → F")
        down((x0 + x1) / 2, y + BOX, "feed_forward")
    y += step
    box(LEFT, RIGHT, y, "feed_forward", "silu(gate) · up", "SwiGLU", code=False)
    down((LEFT + RIGHT) / 2, y + BOX, "feed_forward")
    y += step
    box(LEFT, RIGHT, y, "feed_forward", "w_down", "F → D")
    plus(y + BOX / 2, "feed_forward")

    write(RIGHT, frame_bottom - 26, "block × n_layers", "name", "end")
    box(24, WIDTH - 24, last_norm, "norm", "RMSNorm", "norm", code=False)
    down(STREAM, last_norm + BOX, "ink")
    box(24, WIDTH - 24, head, "vocabulary", "lm_head", "D → V: a score for each next token")
    down(STREAM, head + BOX, "ink")
    last = head + BOX + GAP + 14
    write(STREAM, last, "logits")
    write(WIDTH - 24, last, "for the token after each, (B, T, V)", "note", "end")

    markers = "".join(
        f'<marker id="arrow-{name}" viewBox="0 0 10 10" refX="7" refY="5" markerWidth="{size}" '
        f'markerHeight="{size}" orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
        for name, colour, size in (
            ("ink", colours["ink"], 6),
            ("stream", colours["stream"], 3.4),
            *((kind, colours[kind][1], 6) for kind in ("norm", "attention", "feed_forward")),
        )
    )
    title = "A Llama: embedding, blocks of attention and feed-forward on a residual stream, norm, head"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {last + 22}" role="img">',
            f"  <title>{title}</title>",
            f"  <defs>{markers}</defs>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    for theme in THEMES:
        (HERE / f"block-{theme}.svg").write_text(draw(theme), encoding="utf-8", newline="\n")
