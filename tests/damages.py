"""What may happen to a file on a disk: bytes that are other ones, bytes that are missing, an end that is missing."""

import random


def load_or_refuse(load, file):
    """Return what `load(file)` returns, or None if it refuses the file by name; any other error is a failure."""
    try:
        return load(file)
    except ValueError as error:
        if str(file) not in str(error):
            raise AssertionError("the error does not name the file") from error
        return None


def damages(whole, count=300, seed=0):
    """Yield damaged copies of the bytes `whole`, among them what is most easily believed: another digit or sign."""
    generator = random.Random(seed)
    digits = [place for place, byte in enumerate(whole) if byte in b"0123456789.-e"]
    for number in range(count):
        place = generator.choice(digits) if number % 2 else generator.randrange(len(whole))
        kind = number // 2 % 5
        if kind == 0:  # one bit flips
            yield whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :]
        elif kind == 1:  # one byte becomes a digit
            yield whole[:place] + bytes([generator.choice(b"0123456789")]) + whole[place + 1 :]
        elif kind == 2:  # bytes are lost
            yield whole[:place] + whole[place + generator.randint(1, 4) :]
        elif kind == 3:  # the end is lost
            yield whole[:place]
        else:  # a part of the file occurs twice
            yield whole[:place] + whole[max(0, place - generator.randint(1, 40)) :]
    for depth in (100, 900, 990, 1000, 10_000):  # nested about as deeply as Python can go, and far more deeply
        yield whole.replace(b": [", b": " + b"[" * depth, 1)
        yield whole.rstrip()[:-1] + b', "more": ' + b"[" * depth + b"]" * depth + b"}"
