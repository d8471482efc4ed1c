"""A GIF decoder by the GIF89a specification, as loops over single pixels: what the decoder under test is held to."""

WHITE = (255, 255, 255)


def unpack_lzw(code_bits: int, packed: bytes, pixels: int) -> list[int]:
    """The first `pixels` indices of a frame (appendix F of the specification); fewer where the codes end before."""
    clear, stop = 1 << code_bits, (1 << code_bits) + 1
    bits = "".join(format(byte, "08b")[::-1] for byte in packed)  # the least significant bit comes first
    out: list[int] = []
    table: list[list[int]] = []
    width, place, last = code_bits + 1, 0, None
    while place + width <= len(bits) and len(out) < pixels:
        code = int(bits[place : place + width][::-1], 2)
        place += width
        if code == stop:
            break
        if code == clear or not table:
            table = [[value] for value in range(clear)] + [[], []]
            width, last = code_bits + 1, None
            if code == clear:
                continue
        entry = table[code] if code < len(table) else [*last, last[0]]
        out += entry
        if last is not None and len(table) < 4096:
            table.append([*last, entry[0]])
            if len(table) == 1 << width and width < 12:
                width += 1
        last = entry
    return out[:pixels]


def deinterlace(rows: list[list[int]]) -> list[list[int]]:
    """Rows in the order of the picture (appendix E)."""
    height = len(rows)
    order = [*range(0, height, 8), *range(4, height, 8), *range(2, height, 4), *range(1, height, 2)]
    picture: list[list[int]] = [[]] * height
    for row, place in zip(rows, order, strict=True):
        picture[place] = row
    return picture


def colours(data: bytes, place: int, flags: int) -> tuple[list[tuple[int, int, int]] | None, int]:
    """The colour table at a place, where the flags say that there is one, and the place after it."""
    if not flags & 128:
        return None, place
    count = 2 << (flags & 7)
    return [tuple(data[place + 3 * i : place + 3 * i + 3]) for i in range(count)], place + 3 * count


def sub_blocks(data: bytes, place: int) -> tuple[bytes, int]:
    content = b""
    while data[place]:
        content += data[place + 1 : place + 1 + data[place]]
        place += 1 + data[place]
    return content, place + 1


def decode(data: bytes) -> list[list[list[tuple[int, int, int]]]]:
    """All frames as shown, over white: [frame][y][x] = (red, green, blue)."""

    def number(place: int) -> int:
        return data[place] + 256 * data[place + 1]

    width, height = number(6), number(8)
    table, place = colours(data, 13, data[10])
    canvas: list[list[tuple[int, int, int] | None]] | None = None
    shown = []
    disposal, transparent = 0, None
    while data[place] != 0x3B:
        if data[place] == 0x21:
            label, (content, place) = data[place + 1], sub_blocks(data, place + 2)
            if label == 0xF9:
                disposal, transparent = content[0] >> 2 & 7, content[3] if content[0] & 1 else None
            continue
        assert data[place] == 0x2C
        x0, y0, w, h = (number(place + offset) for offset in (1, 3, 5, 7))
        flags = data[place + 9]
        local, place = colours(data, place + 10, flags)
        packed, after = sub_blocks(data, place + 1)
        indices = unpack_lzw(data[place], packed, w * h)
        rows = [indices[y * w : (y + 1) * w] for y in range(h)]
        rows = deinterlace(rows) if flags & 64 else rows
        if canvas is None:
            width, height = max(width, x0 + w), max(height, y0 + h)
            canvas = [[None] * width for _ in range(height)]
        before = [row[:] for row in canvas]
        inside = [(x, y) for y in range(y0, min(y0 + h, height)) for x in range(x0, min(x0 + w, width))]
        for x, y in inside:
            index = rows[y - y0][x - x0]
            if index != transparent:
                canvas[y][x] = (local or table)[index]
        shown.append([[colour or WHITE for colour in row] for row in canvas])
        if disposal == 2:
            for x, y in inside:
                canvas[y][x] = None
        elif disposal == 3:
            canvas = before
        disposal, transparent, place = 0, None, after
    return shown
