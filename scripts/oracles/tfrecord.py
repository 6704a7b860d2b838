"""Writes tests/oracles/tfrecord.bin: a TFRecord file of tf.train.Example as TensorFlow's writers make it, by nothing but the
published formats: framing and CRC-32C by hand, protocol buffers by hand. src/data/tfrecord/tests.rs knows what is in it.

    python3 scripts/oracles/tfrecord.py
"""

import struct
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "tests" / "oracles" / "tfrecord.bin"


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc32c(length))) + data + struct.pack("<I", masked(crc32c(data)))


def varint(value):
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def delimited(tag, data):
    return varint(tag << 3 | 2) + varint(len(data)) + data


def byte_list(*values):
    return delimited(1, b"".join(delimited(1, value) for value in values))


def float_list(*values):
    return delimited(2, delimited(1, struct.pack(f"<{len(values)}f", *values)) if values else b"")


def int64_list(*values):
    return delimited(3, delimited(1, b"".join(map(varint, values))) if values else b"")


def example(features):
    entries = (delimited(1, name.encode()) + delimited(2, feature) for name, feature in features.items())
    return delimited(1, b"".join(delimited(1, entry) for entry in entries))


def pixels(index):
    """A 2x3 image of 3 channels whose bytes depend on record and place."""
    return bytes((index * 37 + at * 11) % 256 for at in range(2 * 3 * 3))


def imagenet(index, label):
    """The features of the ImageNet records that TensorFlow's models write, and the pixels."""
    return {
        "image/height": int64_list(2),
        "image/width": int64_list(3),
        "image/colorspace": byte_list(b"RGB"),
        "image/channels": int64_list(3),
        "image/class/label": int64_list(label),
        "image/class/synset": byte_list(f"n{index:08}".encode()),
        "image/class/text": byte_list("Tölpel".encode()),
        "image/object/bbox/xmin": float_list(0.25, 0.5),
        "image/object/bbox/xmax": float_list(),
        "image/object/bbox/label": int64_list(),
        "image/format": byte_list(b"JPEG"),
        "image/filename": byte_list(f"n{index:08}.JPEG".encode()),
        "image/encoded": byte_list(b"\xff\xd8 not an image, but bytes \x00 " + bytes([index]) * index),
        "image/raw": byte_list(pixels(index)),
    }


def main():
    labels = [1, 3, 2, 3, 1]
    records = [imagenet(index, label) for index, label in enumerate(labels)]
    # Any order of the map is right, and a reader must not rely on it.
    records[2] = dict(reversed(records[2].items()))
    OUT.write_bytes(b"".join(record(example(features)) for features in records))
    print(f"{OUT}: {OUT.stat().st_size} bytes")


main()
