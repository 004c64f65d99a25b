"""What is below ``inside`` runs in the guest only."""

collect_ignore = ["inside"]
