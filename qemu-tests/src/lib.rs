//! Boots the node in QEMU and drives it: the harness that the tests in `tests/` share.
