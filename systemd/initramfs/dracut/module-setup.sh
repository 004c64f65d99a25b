#!/bin/bash
# dracut module of hostimaged: what mounts a deployment, for images without bootc (dracut.modules(7)).

# Only where it is asked for: add_dracutmodules+=" hostimaged ".
check() {
    require_binaries fsverity || return 1
    return 255
}

depends() {
    echo systemd
}

installkernel() {
    # Whatever the machine has loaded on which the image is built.
    hostonly='' instmods erofs overlay loop
}

install() {
    inst_multiple mount umount modprobe fsverity mkdir rmdir readlink ln cat
    inst_script /usr/lib/hostimaged/setup-root
    # It takes effect here: changing it in the image needs a new initramfs.
    inst_multiple -o /usr/lib/composefs/setup-root-conf.toml
    inst_simple "$moddir/hostimaged-root-setup.service" "$systemdsystemunitdir/hostimaged-root-setup.service"
    $SYSTEMCTL -q --root "$initdir" add-wants initrd-root-fs.target hostimaged-root-setup.service
}
