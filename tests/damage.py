"""What may be in a JSON file or notebook that was cut, or is of another kind."""

DAMAGE = {
    "empty": b"",
    "cut": b'{"a',
    "a list": b"[]",
    "a number": b"5",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "nested": b'{"a":' * 900 + b"1" + b"}" * 900,
}
