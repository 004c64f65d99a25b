"""What an image needs to boot and what a boot loader reads: entries, kernels, arguments, labels; no host."""
