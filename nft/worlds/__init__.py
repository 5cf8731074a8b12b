"""Bundled worlds: small, exactly verifiable tasks that run the real training code on a CPU."""
