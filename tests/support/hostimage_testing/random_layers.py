"""Random layers, reproducible from a seed."""

from __future__ import annotations

import random

from hostimage_testing import tars


class RandomLayers:
    """Layers that fit on each other, in any mix of tar formats, with everything a layer may do."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.directories = [b"usr"]
        self.leaves: list[bytes] = []

    def layer(self, count: int) -> bytes:
        parts = [tars.directory(b"usr/", mtime=self.random.randrange(2**31))] if not self.leaves else []
        parts += [self.entry() for _ in range(count)]
        return b"".join(parts) + self.random.choice([tars.END, tars.END + bytes(512 * 7), tars.END + b"x"])

    def entry(self) -> bytes:
        kinds = [self.file, self.file, self.file, self.directory, self.special, self.symlink]
        if self.leaves:
            kinds += [self.hard_link, self.whiteout, self.file_again]
        return self.random.choice(kinds)()

    def name(self) -> bytes:
        size = self.random.choice([3, 8, 8, 40, 200])
        name = bytes(self.random.choice(b"abcdefgh.-_+ \xe9\xff") for _ in range(size))
        return self.random.choice(self.directories) + b"/" + b"n" + name

    def named(self, path: bytes, **fields: object) -> bytes:
        """Extension headers and header for ``path``, in one of the formats."""
        random_ = self.random
        fields |= {
            "mode": random_.choice([0o644, 0o755, 0o4755, 0o1777, 0]),
            "uid": random_.choice([0, 1000, 65534]),
        }
        fields["mtime"] = random_.choice([0, 1, 1_700_000_000, 2**31 + 5, 2**32 + 5])
        style = random_.randrange(3)
        if style == 0:
            return tars.gnu_long(b"L", path) + tars.header(b"cut", magic=tars.GNU, **fields)  # type: ignore[arg-type]
        records = [
            (b"path", path),
            (b"mtime", b"%d.%09d" % (random_.randrange(2**33), random_.randrange(10**9))),
        ]
        if random_.random() < 0.3:
            records.append((b"SCHILY.xattr.security.capability", random_.randbytes(20)))
        if random_.random() < 0.3:
            records.append((b"SCHILY.xattr.user.test", random_.randbytes(5)))
        if style == 1 or len(path) > 100:
            return tars.pax(*records) + tars.header(b"cut", **fields)  # type: ignore[arg-type]
        return tars.header(self.random.choice([b"", b"/"]) + path, **fields)[:512]  # type: ignore[arg-type]

    def file(self) -> bytes:
        path = self.name()
        self.leaves.append(path)
        return self.content(path)

    def file_again(self) -> bytes:
        return self.content(self.random.choice(self.leaves))

    def content(self, path: bytes) -> bytes:
        size = self.random.choice([0, 1, 64, 65, 100, 4096, 4097, 20_000])
        content = self.random.randbytes(size) if self.random.random() < 0.7 else bytes(size)
        return self.named(path, size=size) + tars.padded(content)

    def directory(self) -> bytes:
        path = self.random.choice([self.name(), self.random.choice(self.directories)])
        if path not in self.directories:
            self.directories.append(path)
        return self.named(path + b"/", kind=b"5")

    def special(self) -> bytes:
        kind = self.random.choice([b"3", b"4", b"6"])
        numbers = (self.random.randrange(512), self.random.randrange(300_000))
        return self.named(self.name(), kind=kind, device=numbers)

    def symlink(self) -> bytes:
        return self.named(self.name(), kind=b"2", link=b"t" * self.random.randrange(1, 99))

    def hard_link(self) -> bytes:
        target = self.random.choice(self.leaves)
        path = self.name()
        self.leaves.append(path)
        return tars.pax((b"path", path), (b"linkpath", target)) + tars.header(b"cut", 0, b"1")

    def whiteout(self) -> bytes:
        path = self.leaves.pop(self.random.randrange(len(self.leaves)))
        directory, _, name = path.rpartition(b"/")
        # The same name may be there through two entries; both go.
        self.leaves = [leaf for leaf in self.leaves if leaf != path]
        return self.named(directory + b"/.wh." + name)
