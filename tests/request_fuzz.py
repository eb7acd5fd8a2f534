"""Changes to honest requests: any field of any request by its descriptor, and the bytes on the wire.

`fields_of` names every field of a message type as a path. `change` changes one field, and `damage` the bytes of a whole message. All
choices are made by the `random.Random` that is given, so a seed repeats them.
"""
import dataclasses
import functools
import math
import struct

from google.protobuf import message_factory

from plain_client import stubs

SERVICES = ("Job", "Data", "Admin", "Peer")
INTEGERS = (0, 1, 2, 3, 7, 255, 256, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, (1 << 62) + 1, (1 << 63) - 1, 1 << 63,
            (1 << 64) - 1)
DOUBLES = (0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e-320, 2.0**-126, 2.0**-127, 2.0**126, 2.0**127, 1e39, 1e308, -1e308, 2.0**53, math.inf,
           -math.inf, math.nan)
# A text that no protobuf string may hold takes the place of this one on the wire. It has as many bytes.
NO_UTF8, BROKEN = "no-utf-8", b"\xff\xfe\xc0\x80\xed\xa0\x80\xf5"
TEXTS = ("", " ", ".", "..", "../..", "/", "//", "a/../b", "\0", "a\0b", "\n", "x", "x" * 64, "x" * 65, "x" * 256, "x" * 257, "x" * 300,
         "ж" * 300, "权重", "вес", "🙂", "\u202egnp", "%s%n", "%00", "w", "gradient", "master", "exp_avg", "exp_avg_sq_absmax", "row_var",
         "adamw", "muon", "adafactor", "store", "stochastic", "4bit", "sum", "lr", NO_UTF8)
LONG_TEXT = "y" * 20_000


@dataclasses.dataclass(frozen=True)
class Method:
    """One RPC, by its descriptor."""
    service: str
    name: str
    request_type: type
    response_type: type

    @property
    def path(self):
        return f"/orlop.v1.{self.service}/{self.name}"

    @property
    def streams_in(self):
        return self.request_type.DESCRIPTOR.name == "Chunk"

    @property
    def streams_out(self):
        return self.response_type.DESCRIPTOR.name == "Chunk"

    def __str__(self):
        return f"{self.service}/{self.name}"


@functools.cache
def methods():
    """Return {"Job/Join": Method} of every RPC."""
    modules = {"Job": stubs().job, "Data": stubs().data, "Admin": stubs().admin, "Peer": stubs().peer}
    found = [Method(service, method.name, message_factory.GetMessageClass(method.input_type),
                    message_factory.GetMessageClass(method.output_type))
             for service in SERVICES for method in modules[service].DESCRIPTOR.services_by_name[service].methods]
    return {str(method): method for method in found}


def is_map(field):
    return field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry


@functools.cache
def fields_of(descriptor):
    """Return the path of every field of a message type and of the messages inside it, as tuples of names."""
    paths = []
    for field in descriptor.fields:
        paths.append((field.name,))
        if field.type == field.TYPE_MESSAGE:
            paths += [(field.name, *path) for path in fields_of(field.message_type)]
    return paths


def number(rng, field, value=0):
    """Return a number that the field can hold: a boundary, or one beside the present value."""
    if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return rng.choice((*DOUBLES, value * 2, -value))
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32, field.CPPTYPE_ENUM) else 64
    is_signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_ENUM)
    if field.cpp_type == field.CPPTYPE_ENUM and rng.random() < 0.5:
        return rng.choice((*(each.number for each in field.enum_type.values), len(field.enum_type.values), 99))
    chosen = rng.choice((*INTEGERS, *(-each for each in INTEGERS), value + 1, value - 1, value + 256, 2 * value)) & ((1 << bits) - 1)
    return chosen - (1 << bits) if is_signed and chosen >> (bits - 1) else chosen


def text(rng, names):
    if rng.random() < 0.02:
        return LONG_TEXT
    return rng.choice(names) if names and rng.random() < 0.4 else rng.choice(TEXTS)


def some_bytes(rng, value):
    """Return bytes that differ from `value` in length or in a bit."""
    choice = rng.randrange(6)
    if choice == 0 or not value:
        return rng.choice((b"", b"\0", b"\xff" * 9, rng.randbytes(300)))
    at = rng.randrange(len(value))
    return (value[:at], value + value, value + b"\0", rng.randbytes(len(value)),
            value[:at] + bytes([value[at] ^ 1 << rng.randrange(8)]) + value[at + 1:])[choice - 1]


def scalar(rng, field, names, value=None):
    if field.type == field.TYPE_STRING:
        return text(rng, names)
    if field.type == field.TYPE_BYTES:
        return some_bytes(rng, value or b"")
    if field.type == field.TYPE_BOOL:
        return not value
    return number(rng, field, value or 0)


def holder(rng, message, path):
    """Return the message that has the last field of `path`. What is absent on the way is made."""
    for name in path[:-1]:
        field, value = message.DESCRIPTOR.fields_by_name[name], getattr(message, name)
        if not field.is_repeated:
            value.SetInParent()
            message = value
        else:
            message = rng.choice(value) if len(value) else value.add()
    return message


def change_map(rng, values, names):
    """Change a map of texts to numbers: a value, a key, all of it, or its length."""
    keys = sorted(values)
    choice = rng.randrange(6)
    if choice == 0 or not keys:
        values[text(rng, names)] = rng.choice(DOUBLES)
    elif choice == 1:
        del values[rng.choice(keys)]
    elif choice == 2:
        values[text(rng, names)] = values.pop(rng.choice(keys)) if hasattr(values, "pop") else 0.0
    elif choice == 3 and rng.random() < 0.1:
        for i in range(2000):
            values[f"key {i}"] = i
    else:
        values[rng.choice(keys)] = rng.choice(DOUBLES)


def change_list(rng, message, field, names):
    values = getattr(message, field.name)
    choice, is_message = rng.randrange(9), field.type == field.TYPE_MESSAGE
    if choice == 0:
        message.ClearField(field.name)
    elif choice == 1 and len(values):
        values.append(values[rng.randrange(len(values))])
    elif choice == 2 and len(values) > 1:
        kept = list(values)
        message.ClearField(field.name)
        getattr(message, field.name).extend(reversed(kept))
    elif choice == 3 and len(values):
        del values[rng.randrange(len(values))]
    elif choice == 4 and rng.random() < 0.1:
        count = rng.choice((1000, 5000, 70_000))
        one = values[0] if len(values) else (values.add() if is_message else scalar(rng, field, names))
        if not is_message or one.ByteSize() * count < 3 << 20:
            values.extend([one] * count)
    elif is_message:
        values.add()
    elif len(values) and choice < 8:
        at = rng.randrange(len(values))
        values[at] = scalar(rng, field, names, values[at])
    else:
        values.append(scalar(rng, field, names))


def change(rng, message, path, names):
    """Change the field at `path` of a message. `names` are texts that mean something to the servers."""
    if len(path) > 1 and is_map(holder(rng, message, path[:-1]).DESCRIPTOR.fields_by_name[path[-2]]):
        return change_map(rng, getattr(holder(rng, message, path[:-1]), path[-2]), names)
    at = holder(rng, message, path)
    field = at.DESCRIPTOR.fields_by_name[path[-1]]
    if is_map(field):
        return change_map(rng, getattr(at, field.name), names)
    if field.is_repeated:
        return change_list(rng, at, field, names)
    if rng.random() < 0.15:
        return at.ClearField(field.name)
    if field.type == field.TYPE_MESSAGE:
        # Without its content, or with one field more of it changed.
        if rng.random() < 0.5:
            at.ClearField(field.name)
        getattr(at, field.name).SetInParent()
        inner = fields_of(field.message_type)
        return change(rng, getattr(at, field.name), rng.choice(inner), names) if inner and rng.random() < 0.5 else None
    return setattr(at, field.name, scalar(rng, field, names, getattr(at, field.name)))


def varint(value):
    out = b""
    while True:
        out += bytes([value & 0x7f | (0x80 if value > 0x7f else 0)])
        value >>= 7
        if not value:
            return out


def wire_field(rng):
    """Return one field with any number, of any wire type, with a few bytes."""
    kind = rng.choice((0, 1, 2, 5, 3))
    tag = varint(rng.choice((1, 2, 3, 4, 5, 7, 8, 15, 16, 99, 19_000, (1 << 29) - 1)) << 3 | kind)
    if kind == 3:
        return tag + varint((tag[0] >> 3) << 3 | 4) if len(tag) == 1 else tag
    body = rng.randbytes(rng.choice((0, 1, 8, 40)))
    return tag + {0: varint(rng.choice(INTEGERS)), 1: bytes(8), 2: varint(len(body)) + body, 5: bytes(4)}[kind]


def damage(rng, wire):
    """Return the bytes of a message with damage that a protobuf library may or may not read."""
    at = rng.randrange(len(wire) + 1)
    choice = rng.randrange(9)
    if choice == 0:
        return wire[:at]
    if choice == 1:
        return wire + wire_field(rng)
    if choice == 2:
        return wire_field(rng) + wire
    if choice == 3:
        return wire + wire  # every field twice
    if choice == 4 and wire:
        at = min(at, len(wire) - 1)
        return wire[:at] + bytes([wire[at] ^ 1 << rng.randrange(8)]) + wire[at + 1:]
    if choice == 5:
        return wire + rng.choice((b"\0", b"\xff" * 11, b"\x0b", b"\x0c", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a" * 3000))
    if choice == 6:
        return rng.randbytes(rng.choice((1, 10, 200)))
    if choice == 7:
        return b""
    return wire[:at] + rng.randbytes(3) + wire[at:]


def serialized(message):
    return message.SerializeToString().replace(NO_UTF8.encode(), BROKEN)


# ---- Digests, as servers compute them ----------------------------------------------------------

MASK = (1 << 64) - 1


def _mix(value):
    value = ((value ^ value >> 30) * 0xbf58476d1ce4e5b9) & MASK
    value = ((value ^ value >> 27) * 0x94d049bb133111eb) & MASK
    return value ^ value >> 31


def _rotated(value, by):
    return (value << by | value >> (64 - by)) & MASK


def _words(data):
    return [len(data), *(int.from_bytes(data[at:at + 8], "little") for at in range(0, len(data), 8))]


def _bits(value):
    return struct.unpack("<Q", struct.pack("<d", value))[0]


def sign(decision):
    """Set the identity of a DecisionBody to what a server computes (server/step/job.cc, Identify)."""
    words = [decision.generation, decision.step, decision.attempt, decision.kind, decision.arithmetic_version,
             decision.previous.high, decision.previous.low, decision.staged.high, decision.staged.low, _bits(decision.scale),
             _bits(decision.sum_of_squares), decision.non_finite_count, *_words(decision.scalars), len(decision.applied_count),
             *decision.applied_count, len(decision.untouched), *decision.untouched]
    high, low = 0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f
    for word in words:
        word &= MASK
        high = _mix(high + word + 0x9e3779b97f4a7c15 & MASK)
        low = (_mix(_rotated(low, 29) ^ word * 0xff51afd7ed558ccd & MASK) + high) & MASK
    decision.identity.high = _mix(high ^ 0x2545f4914f6cdd1d)
    decision.identity.low = _mix(low ^ _rotated(high, 17))
    return decision
