"""A SELinux policy as large as those of distributions, made up: rules of the shapes that real ones have.

Names are random words; only the shapes of expressions are those of real policies.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_TOP = ("usr", "etc", "var", "run", "dev", "opt", "srv", "root", "boot", "sys", "tmp", "mnt", "home", "lib")
_USR = ("bin", "sbin", "lib", "libexec", "share", "local/bin", "lib/systemd/system", "libexec/service")
_STATE = ("lib", "log", "run", "cache", "spool", "lock")
_SYLLABLES = ("ka", "lo", "mi", "ne", "pu", "ra", "si", "to", "ve", "zu", "ba", "de", "fi", "go", "hu")

#: The broad rules that begin every policy: the last that matches decides, so these are read first.
BROAD = """\
/.*\tsystem_u:object_r:default_t:s0
/[^/]+\t--\tsystem_u:object_r:etc_runtime_t:s0
/\t-d\tsystem_u:object_r:root_t:s0
/usr(/.*)?\tsystem_u:object_r:usr_t:s0
/etc(/.*)?\tsystem_u:object_r:etc_t:s0
/var(/.*)?\tsystem_u:object_r:var_t:s0
/run(/.*)?\tsystem_u:object_r:var_run_t:s0
/run/.*\\.*pid\t<<none>>
/dev(/.*)?\tsystem_u:object_r:device_t:s0
/dev/.*\t-c\tsystem_u:object_r:device_c_t:s0
/usr/(.*/)?bin(/.*)?\tsystem_u:object_r:bin_t:s0
/usr/(.*/)?sbin(/.*)?\tsystem_u:object_r:bin_t:s0
/usr/(.*/)?lib(/.*)?\tsystem_u:object_r:lib_t:s0
/usr/(.*/)?lib/.+\\.so(\\.[^/]*)*\t--\tsystem_u:object_r:lib_t:s0
/usr/(.*/)?lib(64)?/.+\\.py[co]?\t--\tsystem_u:object_r:lib_t:s0
/usr/share/man(/.*)?\tsystem_u:object_r:man_t:s0
/usr/share/locale(/.*)?\tsystem_u:object_r:locale_t:s0
/usr/lib/modules(/.*)?\tsystem_u:object_r:modules_object_t:s0
/etc/.*\\.lock\t<<none>>
/home/[^/]+(/.*)?\tsystem_u:object_r:user_home_t:s0
/home/[^/]+/\\.ssh(/.*)?\tsystem_u:object_r:ssh_home_t:s0
/usr/lib/ld-[^/]*\\.so(\\.[^/]*)*\t--\tsystem_u:object_r:ld_so_t:s0
/etc/localtime\tsystem_u:object_r:locale_t:s0
/lost\\+found/.*\t<<none>>
/[^/]+/lost\\+found(/.*)?\t<<none>>
/usr/lib/.*/(?!keep)[^/]*\\.old\tsystem_u:object_r:old_t:s0
/proc/.*\t<<none>>
/sys/.*\t<<none>>
"""
#: Paths that count as others.
SUBSTITUTIONS = """\
/usr/lib64 /usr/lib
/run/lock /var/lock
/usr/local/lib /usr/lib
/var/run /run
/usr/tmp /tmp
"""


def word(rng: random.Random) -> str:
    """A made-up name."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))


def vocabulary() -> list[str]:
    """The names that both rules and paths are made of."""
    rng = random.Random(0)
    return [word(rng) for _ in range(1500)]


def file_contexts(count: int, seed: int = 1) -> bytes:
    """``count`` rules in the order of a compiled policy: broad ones first."""
    rng = random.Random(seed)
    lines = BROAD.splitlines()
    rules = _rules(rng)
    lines += [next(rules) for _ in range(count - len(lines))]
    return ("# made for tests\n\n" + "\n".join(lines) + "\n").encode()


def _rules(rng: random.Random) -> Iterator[str]:
    known = vocabulary()
    while True:
        name, other = rng.choice(known), rng.choice(known)
        place = rng.choice(_USR)
        context = f"system_u:object_r:{name}_t:s0"
        yield from rng.sample(
            (
                f"/usr/{place}/{name}\t--\tsystem_u:object_r:{name}_exec_t:s0",
                f"/usr/{place}/{name}-{other}\t--\t{context}",
                f"/etc/{name}(/.*)?\tsystem_u:object_r:{name}_etc_t:s0",
                f"/etc/{name}\\.conf(\\.d)?(/.*)?\t{context}",
                f"/etc/(rc\\.d/)?init\\.d/{name}\t--\t{context}",
                f"/var/{rng.choice(_STATE)}/{name}(/.*)?\tsystem_u:object_r:{name}_var_t:s0",
                f"/var/log/{name}\\.log.*\t--\t{context}",
                f"/(var/)?run/{name}\\.(pid|sock)\t-s\t{context}",
                f"/run/{name}[^/]*/{other}(/.*)?\t{context}",
                f"/usr/lib(64)?/{name}/({other}|{word(rng)})-[0-9]+(/.*)?\t{context}",
                f"/usr/lib/systemd/system/{name}(@)?.*\\.service\t--\t{context}",
                f"/usr/share/{name}/.*\\.sh\t--\t{context}",
                f"/dev/{name}[0-9]*\t-c\t{context}",
                f"/dev/[shmx]{name}[^/]*\t-b\t{context}",
                f"/usr/(s)?bin/{name}(\\.real|-[a-z]+)?\t--\t{context}",
                f"/home/[^/]+/\\.{name}(/.*)?\t{context}",
                f"/{rng.choice(_TOP)}/{name}/[[:alnum:]_]+/{other}\\+\\+\t-l\t{context}",
            ),
            3,
        )


def paths(count: int, seed: int = 2) -> dict[str, str]:
    """Paths of an image, each with ``d``, ``f`` or ``l``: some that rules are about, many others."""
    rng = random.Random(seed)
    known = vocabulary()
    found = dict.fromkeys(("usr", "etc", "var", "run", "boot", "sysroot", "home"), "d")
    places = (
        "usr/share",
        "usr/lib",
        "usr/bin",
        "etc",
        "var/lib",
        "usr/libexec",
        "usr/share/man",
        "usr/lib64",
    )
    suffixes = ("", ".so", ".so.1.2", ".py", ".conf", ".sh", ".old", "-1", ".service", "\u00e9")
    while len(found) < count:
        base = rng.choice(places) if rng.random() < 0.5 else rng.choice(("usr/share", "usr/lib"))
        depth = rng.choice((0, 0, 1, 1, 2, 3, 4))
        parts = [rng.choice(known) if rng.random() < 0.5 else word(rng) for _ in range(depth)]
        directory = "/".join([base, *parts])
        above = ["/".join(directory.split("/")[:end]) for end in range(1, directory.count("/") + 2)]
        if any(found.get(path, "d") != "d" for path in above):
            continue
        found |= dict.fromkeys(above, "d")
        for _ in range(rng.randint(1, 30)):
            found.setdefault(f"{directory}/{rng.choice(known)}{rng.choice(suffixes)}", rng.choice("ffffl"))
    return found
