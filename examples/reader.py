#!/usr/bin/env python3
"""Restores a disk from a repository, by docs/format.md alone and without any code of nbdbackup.

    reader.py REPOSITORY                          lists the snapshots
    reader.py REPOSITORY SNAPSHOT DISK TARGET     writes a disk to a file; SNAPSHOT may be the start of an id

The password is taken from READER_PASSWORD, the path of a key file from READER_KEY_FILE. Needs the packages blake3 and
zstandard; for encrypted repositories cryptography, and argon2-cffi where a password opens it.
"""

import itertools
import os
import struct
import sys

import blake3
import zstandard

MAGIC = bytes.fromhex("89 6e 62 64 62 6b 0d 0a")
END_MAGIC = bytes.fromhex("89 6b 62 64 62 6e 0d 0a")
CONFIG, KEY_SLOT, DATA_PACK, META_PACK, SNAPSHOT, FENCE = 1, 2, 3, 4, 6, 11
DATA, META = 0, 1
FOLDERS = {DATA: "packs", META: "meta"}
ENCRYPTED = 1


class Damaged(Exception):
    """Stored bytes are not what they should be."""


class NotNow(Exception):
    """A file is of another kind than was looked for."""


def need(condition, what):
    if not condition:
        raise Damaged(what)


def hash_of(data):
    return blake3.blake3(data).digest()


def keyed(key, data):
    return blake3.blake3(data, key=key).digest()


def derived(context, key):
    return blake3.blake3(key, derive_key_context=context).digest()


def open_aead(key, nonce, sealed, bound_to):
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(nonce, sealed, bound_to)
    except InvalidTag:
        raise Damaged("it does not decrypt") from None


def open_text(key, sealed, bound_to):
    return open_aead(keyed(key, sealed[:16]), bytes(12), sealed[16:], bound_to)


def check_header(data, kinds):
    need(len(data) >= 16 and data[:8] == MAGIC, "it does not start with the magic")
    need(data[12:16] == hash_of(data[:12])[:4], "the header's checksum differs")
    need(data[9] == 0 and struct.unpack_from("<H", data, 10)[0] == 1, "an unknown version")
    if data[8] not in kinds:
        raise NotNow(f"kind {data[8]}")


def payload_of(data, kind, mac_key=None):
    """Opens a small file: header, length, payload, checksum, and a MAC unless it is a key slot."""
    check_header(data, [kind])
    (length,) = struct.unpack_from("<I", data, 16)
    end = 20 + length
    need(len(data) == end + (32 if kind == KEY_SLOT else 64), "its length does not fit")
    need(data[end : end + 32] == hash_of(data[:end]), "the checksum differs")
    if kind != KEY_SLOT and mac_key is not None:
        need(data[end + 32 :] == keyed(mac_key, data[:end]), "the MAC differs")
    return data[20:end]


def values(data):
    """Reads a list of tagged values."""
    found, at = {}, 0
    while at < len(data):
        tag, length = struct.unpack_from("<HI", data, at)
        need(at + 6 + length <= len(data), "a tagged value runs past the end")
        found.setdefault(tag, []).append(data[at + 6 : at + 6 + length])
        at += 6 + length
    return found


class Repository:
    def __init__(self, path):
        self.path = path
        master = self.master_key()
        key = lambda context: derived(f"nbdbackup 2026-11 {context}", master)
        self.k_id = key("k_id chunk identifiers")
        self.k_node = key("k_node map node identifiers")
        self.k_mac = key("k_mac config and snapshots")
        self.k_text = key("k_text snapshots and labels")
        self.k_packs = {DATA: key("k_data chunks"), META: key("k_meta map nodes")}
        config = self.either("config", lambda data: values(payload_of(data, CONFIG, self.k_mac)))
        (incompat,) = struct.unpack_from("<Q", config[1][0], 16)
        need(incompat & ~ENCRYPTED == 0, "it needs a feature that is unknown here")
        need(config[4][0] == b"\x01" and config[5][0][0] in (0, 1), "an unknown hash or cipher")
        self.uuid = config[2][0]
        self.chunk_bytes = 1 << config[3][0][0]
        self.encrypted = config[5][0][0] == 1
        self.footers = None

    def read(self, name):
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()

    def either(self, name, use):
        """Uses the one of two equal copies that is whole."""
        first = None
        for copy in (name, name + ".bak"):
            try:
                return use(self.read(copy))
            except (OSError, Damaged) as error:
                first = first or error
        raise first

    def master_key(self):
        folder = os.listdir(os.path.join(self.path, "keys"))
        numbers = sorted({int(name.split(".")[0]) for name in folder})
        slots = [self.either(f"keys/{n}", lambda data: values(payload_of(data, KEY_SLOT))) for n in numbers]
        for slot in slots:
            kind = slot.get(1, [b""])[0]
            if kind == b"\x00":
                return slot[2][0]
            wrapping = None
            if kind == b"\x01" and "READER_PASSWORD" in os.environ:
                from argon2.low_level import Type, hash_secret_raw

                memory_kib, passes, lanes = struct.unpack("<III", slot[4][0])
                wrapping = hash_secret_raw(
                    os.environ["READER_PASSWORD"].encode(),
                    slot[3][0],
                    time_cost=passes,
                    memory_cost=memory_kib,
                    parallelism=lanes,
                    hash_len=32,
                    type=Type.ID,
                    version=0x13,
                )
            elif kind == b"\x02" and "READER_KEY_FILE" in os.environ:
                with open(os.environ["READER_KEY_FILE"], "rb") as file:
                    secret = slot[3][0] + file.read()
                wrapping = derived("nbdbackup 2026-11 key file of a slot", secret)
            if wrapping is None:
                continue
            try:
                return open_aead(wrapping, bytes(12), slot[5][0], b"nbdbackup master key")
            except Damaged:
                continue
        raise SystemExit("no key slot opens: set READER_PASSWORD or READER_KEY_FILE")

    def snapshots(self):
        """Yields identifier, name, start and disks of each snapshot, forgotten ones too."""
        for name in sorted(os.listdir(os.path.join(self.path, "snap"))):
            try:
                fields = values(payload_of(self.read(f"snap/{name}"), SNAPSHOT, self.k_mac))
            except NotNow:
                continue  # the fence of a session that never committed
            need(fields[2][0].hex() == name and fields[3][0] == self.uuid, f"snap/{name} is another snapshot")
            if self.encrypted:
                fields = values(open_text(self.k_text, fields[12][0], b"snapshot" + fields[2][0]))
            disks = {}
            for disk in map(values, fields.get(11, [])):
                disks[disk[1][0].decode()] = (struct.unpack("<Q", disk[2][0])[0], disk[3][0])
            (start,) = struct.unpack("<q", fields[6][0])
            yield name, fields[4][0].decode(), start, disks

    def record(self, kind, pack, offset, length, flags, identifier, limit):
        """Reads a record and undoes its encryption and compression."""
        with open(self.pack_path(kind, pack), "rb") as file:
            file.seek(offset)
            data = file.read(length)
        need(len(data) == length, "the pack ends within the record")
        need(flags >> 4 == (1 if self.encrypted else 0), "the flags do not fit the repository")
        if self.encrypted:
            key = keyed(self.k_packs[kind], pack)
            bound_to = self.uuid + bytes([kind]) + identifier
            data = open_aead(key, struct.pack("<I", offset) + bytes(8), data, bound_to)
        if flags & 15 == 1:
            try:
                data = zstandard.ZstdDecompressor().decompress(data, max_output_size=limit)
            except zstandard.ZstdError as error:
                raise Damaged(f"it does not decompress: {error}") from None
        else:
            need(flags & 15 == 0, "an unknown compression")
        need(len(data) <= limit, "a record is too long")
        return data

    def pack_path(self, kind, pack):
        return os.path.join(self.path, FOLDERS[kind], f"{pack[0]:02x}", pack.hex())

    def places(self, kind, identifier):
        """Looks for a record in all footers: what the index would say."""
        if self.footers is None:
            self.footers = {}
            for kind_of_pack, folder in FOLDERS.items():
                for root, _, names in os.walk(os.path.join(self.path, folder)):
                    for name in names:
                        try:
                            self.read_footer(kind_of_pack, os.path.join(root, name), bytes.fromhex(name))
                        except (OSError, Damaged, NotNow):
                            continue
        return self.footers.get((kind, identifier), [])

    def read_footer(self, kind, path, pack):
        with open(path, "rb") as file:
            data = file.read()
        check_header(data, [META_PACK if kind == META else DATA_PACK])
        need(data[16:32] == self.uuid and data[48:64] == pack, "another pack")
        need(data[64:72] == hash_of(data[:64])[:8], "the start's checksum differs")
        (length,) = struct.unpack_from("<I", data, len(data) - 44)
        need(data[-8:] == END_MAGIC and length <= len(data) - 116, "the trailer does not fit")
        footer = data[len(data) - 44 - length : len(data) - 44]
        need(data[-40:-8] == hash_of(data[:72] + footer), "the footer's hash differs")
        for at in range(0, length, 49):
            offset, size, flags = struct.unpack_from("<IIB", footer, at + 32)
            place = (pack, offset, size, flags)
            self.footers.setdefault((kind, footer[at : at + 32]), []).append(place)

    def find(self, kind, identifier, hint, limit, is_it):
        """Returns the bytes of a record from where the hint says, or from any other place that has it."""
        fault = None
        for place in itertools.chain([hint], self.others(kind, identifier, hint)):
            try:
                data = self.record(kind, *place, identifier, limit)
                need(is_it(data), "the record is not what its identifier says")
                return data
            except (OSError, Damaged) as error:
                fault = error
        raise Damaged(f"{identifier.hex()} is lost: {fault}")

    def others(self, kind, identifier, hint):
        # A generator: the footers are read only when the hint has failed.
        for place in self.places(kind, identifier):
            if place != hint:
                yield place

    def node(self, identifier, hint, level):
        """Returns the children of a map node, by their slots."""

        def parse(data):
            need(data[0] == 1 and data[1] == level and data[3] == 0, "an unknown kind of node")
            packs = [data[20 + 16 * i : 36 + 16 * i] for i in range(data[2])]
            presence = int.from_bytes(data[4:20], "little")
            children, at = {}, 20 + 16 * len(packs)
            for slot in (slot for slot in range(128) if presence >> slot & 1):
                child = data[at : at + 41]
                need(len(child) == 41 and child[32] < len(packs), "a child is cut")
                offset = int.from_bytes(child[33:37], "little")
                size = int.from_bytes(child[37:40], "little")
                children[slot] = (child[:32], (packs[child[32]], offset, size, child[40]))
                at += 41
            need(at == len(data), "a node is too long")
            return presence, children

        def is_it(data):
            presence, children = parse(data)
            ids = b"".join(children[slot][0] for slot in sorted(children))
            return keyed(self.k_node, bytes([level]) + presence.to_bytes(16, "little") + ids) == identifier

        return parse(self.find(META, identifier, hint, 20 + 128 * 57, is_it))[1]

    def chunks(self, identifier, hint, level, first):
        """Yields the number, identifier and hint of each chunk that is not zeros, in order."""
        for slot, (child, place) in sorted(self.node(identifier, hint, level).items()):
            start = first + slot * 128**level
            if level == 0:
                yield start, child, place
            else:
                yield from self.chunks(child, place, level - 1, start)

    def restore(self, size, root, target):
        target.truncate(size)
        if len(root) == 1:
            return
        level, identifier, pack = root[0], root[1:33], root[33:49]
        offset, length, flags = struct.unpack_from("<IIB", root, 49)
        for number, chunk, hint in self.chunks(identifier, (pack, offset, length, flags), level, 0):
            start = number * self.chunk_bytes
            need(start < size, "a chunk lies past the disk's end")
            want = min(self.chunk_bytes, size - start)
            is_it = lambda data: len(data) == want and keyed(self.k_id, data) == chunk
            target.seek(start)
            target.write(self.find(DATA, chunk, hint, want, is_it))


def main():
    if len(sys.argv) not in (2, 5):
        raise SystemExit(__doc__)
    repository = Repository(sys.argv[1])
    for snapshot, name, start, disks in repository.snapshots():
        if len(sys.argv) == 2:
            print(snapshot, name, start, " ".join(sorted(disks)))
        elif snapshot.startswith(sys.argv[2]) and sys.argv[3] in disks:
            with open(sys.argv[4], "wb") as target:
                repository.restore(*disks[sys.argv[3]], target)
            return
    if len(sys.argv) == 5:
        raise SystemExit(f"there is no disk {sys.argv[3]} in a snapshot {sys.argv[2]}")


if __name__ == "__main__":
    main()
