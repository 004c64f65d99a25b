"""Boot loaders of test disks, and what the installer does for each.

The loader of systemd lies in the image. GRUB is a program of one file that finds its configuration as that of
bootupd does: on the file system of /boot, where ``grub.cfg`` reads boot entries and ``user.cfg``.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Where the installer finds programs for boot loaders that are not in the image.
PROGRAMS = "usr/lib/hostimage-testing"
#: Label of the file system that the installer makes for the physical root.
ROOT_LABEL = "root"

_SYSTEMD = """\
cp /usr/lib/systemd/boot/efi/systemd-bootx64.efi /run/esp/EFI/BOOT/BOOTX64.EFI
printf 'timeout 0\\n' >/run/esp/loader/loader.conf"""


@dataclass(frozen=True)
class Loader:
    """A boot loader with a kind of images; ``series`` is the first letter of their versions' directories.

    ``named`` is what status calls it; ``option`` goes to ``hostimaged deploy``, ``install`` are lines of
    shell, for a mounted ESP in ``/run/esp`` and a root in ``/run/root``.
    """

    name: str
    named: str
    series: str
    option: str
    install: str

    @property
    def unified(self) -> bool:
        """Whether images have unified kernel images, which hold the kernel's arguments too."""
        return self.series == "u"

    def image(self, version: str) -> str:
        """The directory of the image of ``version`` ("v1", …) that this boots."""
        return version.replace("v", self.series, 1)


@dataclass(frozen=True)
class Grub:
    """A release of GRUB as Debian has it, made one program with a configuration that leads to ``grub.cfg``.

    ``modules`` go beyond what every release needs here; ``menu`` are the lines of ``grub.cfg`` that make the
    menu, after those that all have.
    """

    suite: str
    modules: tuple[str, ...]
    menu: str

    @property
    def program(self) -> str:
        """Its file name below ``PROGRAMS``."""
        return f"grub-{self.suite}.efi"

    @property
    def install(self) -> str:
        """Lines of shell for ``Loader.install``."""
        return f"""\
cp /{PROGRAMS}/{self.program} /run/esp/EFI/BOOT/BOOTX64.EFI
mkdir -p /run/root/boot/grub2
cat >/run/root/boot/grub2/grub.cfg <<'MENU'
set timeout=0
set default=0
{self.menu}
MENU"""


#: bootupd's last part, which bootc's menu of unified kernel images is for.
_USER_CFG = "if [ -f ${config_directory}/user.cfg ]; then\n  source ${config_directory}/user.cfg\nfi"
#: Debian 13's, which knows no boot entries.
GRUB_2_12 = Grub("trixie", (), _USER_CFG)
#: The first release that knows them; with ``--path``, since /boot is no file system of its own.
GRUB_2_14 = Grub("forky", ("blsuki",), "blscfg --path /boot/loader/entries\n" + _USER_CFG)
GRUBS = (GRUB_2_12, GRUB_2_14)

_UUID_OPTION = '--bootloader grub --esp-uuid "$(blkid -p -s UUID -o value /dev/vdb1)"'
SYSTEMD = Loader("systemd", "systemd", "v", "--bootloader systemd", _SYSTEMD)
SYSTEMD_UKI = Loader("systemd-uki", "systemd", "u", "--bootloader systemd", _SYSTEMD)
GRUB_UKI = Loader("grub-uki", "grub", "u", _UUID_OPTION, GRUB_2_12.install)
GRUB_BLS = Loader("grub-bls", "grub", "v", "--bootloader grub", GRUB_2_14.install)
