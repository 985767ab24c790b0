"""All attacks by name. Files and bodies are built when an attack begins, before its time counts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from reward_service.protocol import MAX_PAIRS, MSGPACK
from tests.support.attacks import bodies, connections, jpeg, png, prompts, webp
from tests.support.attacks.bodies import Message
from tests.support.attacks.sending import Target, in_parallel

_LEAVE_S = 1.0
_FILE_CONNECTIONS, _CONNECTIONS = 2, 8
#: A photograph-sized budget: how many flat images of 25 megapixels one request may hold.
_IMAGES = 13
_PROMPTS = 128


@dataclass(frozen=True)
class Attack:
    """An attack: `prepare` builds what is sent, and returns the function that one connection repeats.

    Attributes:
        group: the kind of attack, a heading of the report
        name: name on the command line
        prepare: returns a function of the target and the number of the connection
        connections: number of connections at once
    """

    group: str
    name: str
    prepare: Callable[[], Callable[[Target, int], None]]
    connections: int

    def run(self, target: Target, play: Callable[[Target, int], None]) -> None:
        """Run the attack until the target's deadline."""
        in_parallel(self.connections, partial(play, target), target)


def attacks() -> dict[str, Attack]:
    """Return all attacks by name, in the report's order."""
    return {attack.name: attack for attack in (*_images(), *_bodies(), *_connections(), *_prompts())}


def _repeating(build: Callable[[], Message]) -> Callable[[Target, int], None]:
    """Return the play of a connection that repeats a request, and leaves after a second every other time."""
    return _sending(itertools.repeat(build()))


def _sending(messages: Iterator[Message]) -> Callable[[Target, int], None]:
    """Return the play of a connection that sends one request after the other, as `_repeating` does."""
    lock, turns = threading.Lock(), itertools.count()

    def play(target: Target, _: int) -> None:
        with lock:
            turn, message = next(turns), next(messages)
        target.exchange(message, None if turn % 2 else _LEAVE_S)

    return play


def _renamed(build: Callable[[], Message]) -> Callable[[Target, int], None]:
    """Return the same, with a new client for every request."""
    message = build()
    named = (replace(message, headers={"X-Client-Id": f"attacker-{number}"}) for number in itertools.count())
    return _sending(named)


def _images() -> Iterator[Attack]:
    for name, build in _files().items():
        prepare = partial(_repeating, partial(_request_of, build))
        yield Attack("images", name, prepare, _FILE_CONNECTIONS)
    # Without keys, a client gives itself any name.
    for name in ("jpeg-6000-scans", "png-13-flat", "webp-13-flat", "png-1024-elongated"):
        renamed = partial(_renamed, partial(_request_of, _files()[name]))
        yield Attack("images", f"{name}-of-many-clients", renamed, _CONNECTIONS)


def _request_of(build: Callable[[], bytes | list[bytes]]) -> Message:
    built = build()
    return bodies.images(*([built] if isinstance(built, bytes) else built))


def _files() -> dict[str, Callable[[], bytes | list[bytes]]]:
    """Return functions that build the images of one request."""
    small, size = png.chunk(b"aaAa"), bodies.LARGE
    return {
        "jpeg-6000-scans": lambda: jpeg.run_scans(6000),
        "jpeg-60-scans-of-13": lambda: [jpeg.run_scans(60)] * _IMAGES,
        "jpeg-20-scans-of-13": lambda: [jpeg.run_scans(20)] * _IMAGES,
        "jpeg-sequential-scans": lambda: jpeg.sequential_scans(500),
        "jpeg-refining-scans": lambda: jpeg.refining_scans(2000),
        "jpeg-scans-of-small-images": lambda: [jpeg.run_scans(100, 64)] * 1024,
        "jpeg-arithmetic": lambda: [jpeg.arithmetic()] * _IMAGES,
        "jpeg-arithmetic-scans": lambda: jpeg.arithmetic(jpeg.SOF_ARITHMETIC_PROGRESSIVE, 1000),
        "jpeg-refined-coefficients": jpeg.refined_coefficients,
        "jpeg-stuffed-scan": lambda: jpeg.scan_of(b"\xff\0", size),
        "jpeg-filled-scan": lambda: jpeg.scan_of(b"\xff\xff\0", size),
        "jpeg-restarts-in-scan": lambda: jpeg.scan_of(b"\xff\xd0", size),
        "jpeg-restarts": lambda: [jpeg.restarts()] * _IMAGES,
        "jpeg-empty-app2": lambda: jpeg.empty_segments(2_000_000),
        "jpeg-empty-comments": lambda: jpeg.empty_segments(2_000_000, 0xFE),
        "jpeg-13-hidden-size": lambda: [jpeg.hidden_size(500)] * _IMAGES,
        "jpeg-comments-between-scans": lambda: jpeg.empty_segments_in_scan(10_000_000),
        "jpeg-fill-bytes": lambda: jpeg.fill_bytes(20_000_000),
        "jpeg-fill-bytes-60-mb": lambda: jpeg.fill_bytes(size),
        "jpeg-stray-restarts": lambda: jpeg.fill_bytes(size // 2, b"\xff\xd0"),
        "jpeg-stray-bytes": lambda: jpeg.fill_bytes(size, b"\x55"),
        "jpeg-quantization-tables": lambda: jpeg.table_segments(size),
        "jpeg-huffman-tables": lambda: jpeg.huffman_segments(2_500_000),
        "jpeg-photoshop-resources": lambda: jpeg.photoshop_segments(size),
        "jpeg-exif-pieces": lambda: jpeg.exif_pieces(50_000, 100),
        "jpeg-exif-long-pieces": lambda: jpeg.exif_pieces(900, 65_000),
        "jpeg-profile-pieces": lambda: jpeg.icc_pieces(2_000_000),
        "jpeg-multi-picture": lambda: [jpeg.multi_picture(4000)] * 900,
        "jpeg-trailing-bytes": lambda: jpeg.trailing(size),
        "png-empty-chunks": lambda: png.flat(before=small * 1_000_000),
        "png-empty-chunks-behind": lambda: png.flat(after=small * 1_000_000),
        "png-chunks-of-many-images": lambda: [png.flat(before=small * 4000)] * 1024,
        "png-13-flat": lambda: [png.flat(png.SIDE_PX)] * _IMAGES,
        "png-13-deep-filtered": lambda: [png.flat(png.SIDE_PX, png.RGBA, 16, row_filter=4)] * _IMAGES,
        "png-13-misstated": lambda: [png.misstated()] * _IMAGES,
        "png-13-palette": lambda: [png.flat(png.SIDE_PX, png.PALETTE)] * _IMAGES,
        "png-13-black-and-white": lambda: [png.flat(png.SIDE_PX, png.GREY, 1)] * _IMAGES,
        "png-13-interlaced": lambda: [png.flat(png.SIDE_PX, png.RGB, interlaced=True)] * _IMAGES,
        "png-pixels-byte-by-byte": lambda: [png.split_pixels(png.SIDE_PX, 1)] * _IMAGES,
        "png-empty-pixels": lambda: png.empty_pixels(4_000_000),
        "png-pixels-beyond-size": lambda: png.too_many_pixels(size),
        "png-empty-deflate-blocks": lambda: png.empty_blocks(size),
        "png-13-elongated": lambda: [png.elongated(500, 50_000), png.elongated(50_000, 500)] * 6,
        "png-1024-elongated": lambda: [png.elongated(1, 100), png.elongated(100, 1)] * 512,
        "png-texts": lambda: [png.texts(60, 2**20)] * 900,
        "png-small-texts": lambda: png.flat(before=png.chunk(b"tEXt", b"a\0b") * 1_000_000),
        "png-profiles": lambda: png.texts(50_000, 2**20, b"iCCP"),
        "png-exif-tags": lambda: [png.exif_tags()] * 76,
        "png-exif-text": lambda: [png.exif_text(1_000_000)] * 1024,
        "png-exif-long-text": lambda: [png.exif_text(15_000_000)] * 1024,
        "png-exif-text-of-empty-blocks": lambda: png.exif_text_of_empty_blocks(size),
        "png-frames": lambda: png.frames(1_500_000),
        "webp-13-flat": lambda: [webp.flat(webp.SIDE_PX)] * _IMAGES,
        "webp-empty-chunks": lambda: webp.empty_chunks(3_000_000),
        "webp-empty-chunks-behind": lambda: webp.empty_chunks(3_000_000, first=False),
        "webp-chunks-in-frame": lambda: webp.subchunks(3_000_000),
        "webp-10000-frames": lambda: [webp.frames(10_000)] * _IMAGES,
        "webp-1000000-frames": lambda: webp.frames(1_000_000, 64),
    }


def _bodies() -> Iterator[Attack]:
    for name, build in _messages().items():
        yield Attack("bodies", name, partial(_repeating, build), _FILE_CONNECTIONS)


def _messages() -> dict[str, Callable[[], Message]]:
    """Return functions that build requests."""
    size = bodies.LARGE
    return {
        "form-weights-lists": lambda: bodies.form_json("weights", b'"":[]'),
        "form-weights-distinct": lambda: bodies.form_json("weights", b'"a":1'),
        "form-weights-nested": lambda: bodies.form_field("weights", b"[" * 100),
        "form-weights-digits": lambda: bodies.form_field("weights", b"9" * 100),
        "form-evaluators-commas": lambda: bodies.form_field("evaluators", b",", 20_000_000),
        "form-evaluators-blanks": lambda: bodies.form_field("evaluators", b" \t"),
        "form-normalization": lambda: bodies.form_field("normalization", b"z"),
        "form-long-prompt": lambda: bodies.form_field("prompt", b"&amp;"),
        "form-unknown-field": lambda: bodies.form_field("x" * 100, b"y"),
        "form-parts": lambda: bodies.form_parts(800_000),
        "form-near-boundaries": lambda: bodies.near_boundaries(),
        "form-headers": lambda: bodies.form_head(b"a: b\r\n"),
        "form-one-header": lambda: bodies.form_head(b"a"),
        "form-disposition-parameters": lambda: bodies.raw_form(
            b'--frontier\r\nContent-Disposition: form-data; name="prompt"'
            + b";a=b" * 1_000_000
            + b"\r\n\r\nx\r\n"
        ),
        "form-backslashes": lambda: bodies.raw_form(
            b'--frontier\r\nContent-Disposition: form-data; name="' + b"\\" * 5_000_000 + b'"\r\n\r\nx\r\n'
        ),
        "form-whole-boundaries": lambda: bodies.form_field("image", b"\r\n--frontierz"),
        "form-padded-boundary": lambda: bodies.raw_form(
            bodies.part("image", b"") + b"--frontier" + b" " * size
        ),
        "form-full-headers": lambda: bodies.form_of_full_headers(),
        "form-line-ends": lambda: bodies.raw_form(b"\r\n" * (size // 2)),
        "form-long-boundary": lambda: bodies.raw_form(
            b"--" + b"a" * 8000 + b"\r\n" + (b"\r\n--" + b"a" * 7999) * 7000,
            "multipart/form-data; boundary=" + "a" * 8000,
        ),
        "deterministic": lambda: bodies.deterministic(1024),
        "raw-pixels": lambda: bodies.raw_pixels(4470),
        "compressed": lambda: Message(png.zeros(2**26), headers={"Content-Encoding": "deflate"}),
        "json-items": lambda: bodies.json_items(b"{}"),
        "json-nested": lambda: bodies.json_text(b"[" * size),
        "json-nested-objects": lambda: bodies.json_text(b'{"a":' * (size // 5)),
        "json-digits": lambda: bodies.json_text(b'{"items":' + b"9" * size + b"}"),
        "json-blanks": lambda: bodies.json_text(b" " * size),
        "json-escapes": lambda: bodies.json_image("\u00e9" * (size // 6)),
        "json-base64": lambda: bodies.json_image("A" * size),
        "json-weights": lambda: bodies.json_beside(
            b'"weights":{' + b",".join(b'"%d":1' % n for n in range(100_000)) + b"}"
        ),
        "json-evaluators": lambda: bodies.json_beside(b'"evaluators":[' + b'"",' * 100_000 + b'""]'),
        "json-unknown-members": lambda: bodies.json_beside(b'"x":[' + b"[[[]]]," * 100_000 + b"0]"),
        "json-unknown-lists": lambda: bodies.json_beside(b'"x":' + b"[" * 900 + b"]" * 900),
        "msgpack-items-nil": lambda: bodies.msgpack_items(b"\xc0"),
        "msgpack-items-empty": lambda: bodies.msgpack_items(b"\x80"),
        "msgpack-items-announced": lambda: Message(b"\x81\xa5items\xdd\xff\xff\xff\xff", MSGPACK),
        "msgpack-evaluators": lambda: bodies.msgpack_value(b"evaluators", b"\xdd", b"\xa0"),
        "msgpack-evaluator-names": lambda: bodies.msgpack_value(b"evaluators", b"\xdd", b"\xa4clip"),
        "msgpack-weights": lambda: bodies.msgpack_value(b"weights", b"\xdf", b"\xa0\x01"),
        "msgpack-unknown": lambda: bodies.msgpack_value(b"x", b"\xdd", b"\x91\xc0"),
        "msgpack-items-repeated": lambda: bodies.msgpack_repeated(
            b"items", b"\x91\x82\xa6prompt\xa1x\xa5image\x81\xa4data\xc4\0"
        ),
        "msgpack-image-repeated": lambda: bodies.msgpack_repeated(
            b"image", b"\x81\xa4data\xc4\0", b"\x81\xa5items\x91"
        ),
        "msgpack-long-choice": lambda: Message(
            b"\x81\xadnormalization\xdb" + size.to_bytes(4, "big") + b"'" * size, MSGPACK
        ),
        "msgpack-nested": lambda: bodies.msgpack_nested(size),
    }


def _connections() -> Iterator[Attack]:
    plays = {
        "chunks-of-one-byte": connections.small_chunks,
        "chunks-of-a-form": connections.small_chunks_of_a_form,
        "chunks-after-refusal": connections.small_chunks_after_refusal,
        "chunks-after-bad-type": connections.small_chunks_after_bad_type,
        "chunks-of-a-get": connections.small_chunks_of_a_get,
        "chunk-extensions": connections.chunk_extensions,
        "chunk-extension-without-end": connections.one_long_extension,
        "chunk-sizes-padded": connections.padded_sizes,
        "trailers-without-end": connections.trailers,
        "trailers-1000": connections.many_trailers,
        "accept-60-kb": connections.long_accept,
        "accept-commas": connections.commas_in_accept,
        "headers-60-kb": connections.long_headers,
        "target-60-kb": connections.long_target,
        "headers-10000": connections.many_headers,
        "headers-without-end": connections.headers_without_end,
        "header-by-bytes": connections.one_header_by_bytes,
        "header-folded": connections.folded_header,
        "blank-lines": connections.blank_lines,
        "noise": connections.noise,
        "pipeline": connections.pipeline,
        "pipeline-unread": connections.pipeline_unread,
        "pipeline-of-refusals": connections.pipeline_behind_refusal,
        "churn": connections.churn,
        "idle-connections": connections.idle_connections,
        "bodies-announced": connections.slow_bodies,
        "upgrades": connections.upgrades,
        "known-addresses": connections.known_addresses,
        "refused-bodies": connections.refused_bodies,
    }
    for name, play in plays.items():
        yield Attack("connections", name, partial(_returned, play), _CONNECTIONS)


def _returned(play: Callable[[Target, int], None]) -> Callable[[Target, int], None]:
    return play


def _prompts() -> Iterator[Attack]:
    yield Attack("prompts", "entity-of-4301-digits", partial(_repeating, _entities), _FILE_CONNECTIONS)
    alone = lambda: _sending(bodies.texts(prompts.entities(4301 + n % 5000)) for n in itertools.count())  # noqa: E731
    yield Attack("prompts", "entity-alone", alone, _CONNECTIONS)
    kinds = {
        "random-letters": prompts.random_word,
        "syllables": prompts.repeated_syllables,
        "emoji-word": prompts.emoji_word,
        "emoji-words": prompts.emoji_words,
        "ordinary-words": prompts.ordinary_words,
        "joined-emoji": prompts.joined_emoji,
        "combining-marks": prompts.combining_marks,
        "mojibake": prompts.mojibake,
        "half-mojibake": prompts.half_mojibake,
        "nested-entities": prompts.nested_entities,
        "open-entities": prompts.open_entities,
        "references": prompts.many_references,
        "apostrophes": prompts.apostrophes,
        "blanks": prompts.blanks,
        "expanding-characters": prompts.expanding,
        "ideographs": prompts.han,
        "terminal-escapes": prompts.escapes,
        "digits": prompts.long_digits,
    }
    for name, write in kinds.items():
        yield Attack("prompts", name, lambda write=write: _sending(_batches(write)), _FILE_CONNECTIONS)  # type: ignore[misc]
    for name in ("ordinary-words", "half-mojibake"):
        most = partial(_batches, kinds[name], MAX_PAIRS)
        yield Attack("prompts", f"{name}-1024", lambda most=most: _sending(most()), _FILE_CONNECTIONS)  # type: ignore[misc]


def _entities() -> Message:
    return bodies.texts(*(prompts.entities(4301 + number) for number in range(8)))


def _batches(write: Callable[[int], str], size: int = _PROMPTS) -> Iterator[Message]:
    """Yield requests of prompts that no cache has seen."""
    numbers = itertools.count()
    while True:
        yield bodies.texts(*(write(next(numbers)) for _ in range(size)))
