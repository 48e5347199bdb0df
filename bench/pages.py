"""Pages hold blocks that scripts of this folder rebuild. This finds a script's blocks and puts the new text into them.

    <!-- NAME: rebuilt by bench/SCRIPT.py -->
    all that stands here is made anew
    <!-- end of NAME -->

Everything else on a page stays byte for byte what it is, the blocks of other scripts among it.
"""

import re
from collections.abc import Callable


class Refused(ValueError):
    """A page whose blocks cannot be filled: in one line, which page and block, and why."""


def rebuilt(
    text: str, blocks: dict[str, str | Callable[[], str]], script: str, where: str, each_once: bool = False
) -> str:
    """A page's text with each of a script's blocks made anew.

    blocks: name -> the new text, or what makes it, called only for a block that the page holds. A blank line beside a
    marker is part of the text. script: as the markers name it, "bench/readme.py" say. where: the page, for messages.
    each_once: every one of `blocks` must stand on the page, once; otherwise a page may hold any of them, or none.

    Refused for a marker that nobody builds, a block without exactly one end before the script's next block begins, and
    with each_once for a block that is missing or there twice.
    """
    before, *rest = re.split(rf"<!-- (\S+): rebuilt by {re.escape(script)} -->", text)
    names, pieces = rest[::2], rest[1::2]  # a piece: what stands between a marker and the next one
    for name in names:
        if name not in blocks:
            raise Refused(f"{where}: nobody builds the block {name!r}; the blocks are {', '.join(blocks)}")
    for name in blocks:
        if each_once and names.count(name) != 1:
            raise Refused(f"{where}: must hold the block {name} once, and holds it {names.count(name)} times")

    made = [before]
    for name, piece in zip(names, pieces, strict=True):
        end = f"<!-- end of {name} -->"
        _, *after = piece.split(end)
        if len(after) != 1:
            raise Refused(f"{where}: the block {name} needs one end, and has {len(after)}")
        new = blocks[name]
        new = new() if callable(new) else new
        made.append(f"<!-- {name}: rebuilt by {script} -->\n{new}\n{end}{after[0]}")
    return "".join(made)
